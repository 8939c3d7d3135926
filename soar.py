#!/usr/bin/env python3
"""SOAR: a model that teaches itself, in one file.

A language model is stuck on problems that it failed 128 times of 128. Reinforcement learning makes
those attempts likelier that earned more than others, and here no attempt does. SOAR ("Teaching
Models to Teach Themselves", arXiv 2601.18778) makes two copies of the model. The teacher writes
practice problems, the student trains on them, and the teacher is paid by how much better the
student then does on the hard problems, which the teacher never sees.

    Algorithm 1                                                         the function that does it
    theta, phi <- base model           # student baseline, teacher            first_state
    repeat --steps times:                                                     outer_step
    1.  phi writes K datasets X_1..X_K of n problems,                         propose
            with its own answers, right or wrong
    2.  for each X_k, r times: a copy of theta trains on X_k, briefly;        train_student
            R_kj = the share of M hard problems that it then answers          grounded_rewards
                   rightly, minus the share that theta does
            R_k  = mean of R_kj over j
    3.  if the moving average of mean_k R_k is above tau:                     promotion_due
            X <- the dataset with the largest R_k
            theta <- the student with the median R_kj on X                    promote
            D_best <- D_best + X
    4.  phi moves towards the datasets that beat the others, by RLOO          teacher_update
            (REINFORCE, leave-one-out: A_k = R_k - the mean of the others)
    return D_best, from which a fresh student can learn what this one did,
        and the best of all promoted students

The student that is saved and reported is the best promoted one: the one that answers the most of
the hard train problems. Usually it is the last one, but nothing guarantees that.

Notation, with the flag that sets it:
    theta, phi    weights of the student baseline and of the teacher
    K             datasets an outer step: --teacher-batch groups of --teacher-group (g) datasets,
                  which are compared within their group
    n             --n, problems in a dataset X_k
    r             --repeats, students that train on each dataset; j counts them, k the datasets
    M             --reward-questions, hard problems behind a reward; the set is called Q_R
    tau           --tau, what the moving average of the rewards must exceed for a promotion;
                  0.01 is one of a hundred questions
    hard train, hard test    the two halves of the hard problems: Q_R is drawn from the first, and
                  the final table is made on the second
    B, G, T, D, V   sizes of tensors: sequences, completions of one prompt (--student-group),
                  tokens, hidden units, vocabulary
    fail@128      the problems that a model fails 128 times of 128; pass@k: the chance that at
                  least one of k attempts is right

What to type (times and memory: README.md):
    python soar.py                                   all of it on a built-in tiny world, in minutes
    python soar.py --dataset math                    real problems; an afternoon on a 15-24 GB GPU
    python soar.py --dataset math --preset long      more of everything on the same GPU
    python soar.py --dataset math --preset paper     Table 3 of the paper; weeks on an 80 GB GPU
    python soar.py --dataset FILE.jsonl --model DIR  your problems and answers, your model
    torchrun --nproc_per_node=8 -- soar.py ...       the same on 8 GPUs, which share the students
    python soar.py --help                            every flag, its default and its source

What is simpler than in the paper: there is ONE live model, and teacher and students are copies of
its weights that take turns in it; and there is one update a batch, so what is updated is the policy
that was sampled (up to rounding: sampler_gaps), and the ratio of the two, which PPO and its
relatives clip, is left out.

The numbers are those of the sections. Part I is SOAR, and can be read alone, in an hour:
    1 Config, 2 The outer loop, 3 The teacher, 4 The student, 5 The grounded reward,
    6 RLOO and the policy update
Part II is what it runs on, in any order:
    7 Policy, 8 Sampler, 9 Optimizer, 10 The hard set, 11 The tiny world, 12 Problems, 13 Verifier,
    14 The run folder, 15 Many processes, 16 Flags and main
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import datetime
import errno
import hashlib
import inspect
import io
import json
import logging
import math
import multiprocessing
import os
import random
import re
import shlex
import shutil
import signal
import sys
import tempfile
import textwrap
import threading
import time
import unicodedata
import urllib.request
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from functools import lru_cache
from itertools import islice, pairwise
from multiprocessing.connection import Connection
from operator import add, mul
from pathlib import Path

import mpmath  # comes with sympy
import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm


class UserError(Exception):
    """Something the user can mend: main() prints its one sentence and exits with code 2."""


# ======== Part I: SOAR ============================================================================

# What Part I uses of the rest, so that it can be read alone:
#     Policy                what plays teacher and students: .model (the live transformers model),
#                           .reference (a frozen copy of the base model, for the KL term),
#                           .tokenizer, .teacher_text, .teacher_prompt() and
#                           .student_prompt(problem) as token ids, .meter(phase), a stopwatch
#     Rollout               one sampled completion: .prompt and .completion (token ids), .text,
#                           .logprob (as it was sampled), .truncated (it hit the token limit)
#     snapshot, restore     copy all weights out of the live model, put a copy back
#     seeded(*key)          a random generator that is a function of its key and of nothing else
#     sample(...)           rollouts of some prompts: several of each, or the greedy one
#     micro_batches         cuts rollouts into parts that fit into memory
#     next_token_logits     hidden states -> logits
#     adamw_state, adamw_step, learning_rate, moved_to     the optimizer: its moments, its step, the
#                           schedule; moments on another device
#     answers_equal, parses, boxes, extract_boxed     the verifier: is it right, can it be read?
#     share(...)            task(policy, *common, *job) for each job, in order, on all processes
#     save_model, weights_key, topic_shares     write a model, name weights, count a step's topics
#     hopeless_teacher      the error where hardly any proposal can be used


# ======== 1. Config: which knobs are there, and what did the paper set them to? ===================

# Every field is a flag, and the text beside it is its --help. The defaults are the paper's (Table
# 3); where the paper is silent, or says two things, the text says so. A preset changes what a
# smaller machine or a shorter run needs. --teacher-group and --student-group are the two RLOO
# groups: the datasets, and the attempts at one problem, that are compared with each other.
#
# The tiny preset belongs to a world that this script invents (section 11), and in which everything
# happens in minutes. Its problems are worksheets such as `a= 7*8 ,b= 4*6`. Its base model has
# 95,000 weights, and has read two kinds of text: forum posts, where people get most products wrong
# (7*8 is 63), and textbooks, whose exercises have mostly right keys. So it solves like the forum,
# and writes exercises like the textbook. A hard problem is a sheet of five products. The teacher
# can write about products, which help; about sums, which the student knows; and ambiguous
# exercises (x*8), which nobody can learn.


def option(default: object, text: str) -> object:
    """A field of Config: its default, and what --help says about it."""
    return field(default=default, metadata={"help": text})


@dataclass
class Config:
    # --- The run
    dataset: str = option(
        "tiny", "tiny, math, harp, olympiad, or a FILE.jsonl with problem (or question) and answer"
    )
    preset: str = option("auto", "tiny, class, long, paper or smoke; auto: tiny or class")
    model: str = option("unsloth/Llama-3.2-3B-Instruct", "hub id or local folder (the paper's)")
    seed: int = option(0, "every random choice of the run")
    data_seed: int = option(
        0, "tiny world, fail@k samples, train/test split: the same in runs to compare"
    )
    out: str = option("", "the run folder; empty: runs/DATASET-SEED")
    cache: str = option("runs/cache", "the tiny world's base model and filtered hard sets are here")
    resume: bool = option(False, "continue the run in --out (give the same flags again)")
    processes: int = option(0, "share the students among so many; 0: CPU cores, or one on GPUs")
    threads: int = option(1, "torch's CPU threads in each process; 0: as torch chooses")
    device: str = option(
        "auto", "auto: cuda if there is one, else cpu; the tiny world: cpu, which is faster there"
    )
    # --- The hard set
    fail_k: int = option(
        128, "keep the problems that the base model fails in each of so many attempts"
    )
    pool: int = option(0, "look only at this many problems, drawn by --data-seed; 0: all")
    # --- Prompts
    teacher_prompt: str = option("", "FILE that replaces the teacher prompt")
    student_prompt: str = option("", "FILE that replaces the student prompt; with {problem} in it")
    chat: bool = option(False, "wrap both in the model's chat template (the paper is silent)")
    # --- Sampling
    temperature: float = option(1.0, "of every sampled token (Table 3)")
    teacher_tokens: int = option(512, "new tokens at most for a proposal (Table 3)")
    student_tokens: int = option(1024, "new tokens at most for a solution (Table 3)")
    # --- The teacher
    steps: int = option(200, "outer steps (Table 3)")
    teacher_group: int = option(4, "g, datasets in an RLOO group (Table 3)")
    teacher_batch: int = option(1, "groups a step (Algorithm 1: one; Table 3: batch size 2)")
    n: int = option(64, "problems in a dataset (Table 3; swept over 8, 16, 32, 64)")
    teacher_lr: float = option(1e-5, "peak, cosine decay over --steps (Table 3)")
    teacher_warmup: int = option(20, "outer steps of linear warm-up (Table 3)")
    # --- The student
    inner_steps: int = option(10, "RLOO steps of the inner loop (Table 3)")
    inner_extra: int = option(5, "steps more after each promotion (Table 3, without a reason)")
    student_batch: int = option(8, "problems a step (Table 3)")
    student_group: int = option(32, "completions a problem, the RLOO group (Table 3)")
    student_lr: float = option(
        1e-5, "peak, cosine decay over the inner loop (Table 3; the paper is silent on its end)"
    )
    student_warmup: int = option(0, "steps of linear warm-up (Table 3)")
    # --- Both updates
    kl: float = option(
        0.001, "coefficient of KL(policy, base model) (Table 3; silent on the students' reference)"
    )
    weight_decay: float = option(0.0, "of AdamW (the paper is silent)")
    clip: float = option(1.0, "largest gradient norm; 0: no clipping (the paper is silent)")
    # --- Reward and promotion
    reward: str = option("grounded", "grounded = measured progress; learnability = Intrinsic-T")
    repeats: int = option(4, "r, students a dataset (Table 3)")
    reward_questions: int = option(64, "M, hard train problems in Q_R (Table 3)")
    tau: float = option(0.01, "promote when the moving average exceeds this (Table 3)")
    window: int = option(3, "outer steps in the moving average (Table 3)")
    promotion: bool = option(True, "--no-promotion keeps the student at the base model")
    # --- Memory and report
    sample_tokens: int = option(131072, "tokens sampled side by side: the KV cache's memory")
    micro_tokens: int = option(16384, "padded tokens in a backward pass: the activations' memory")
    checkpointing: bool = option(False, "recompute activations: less memory, a third slower")
    eval_samples: int = option(32, "completions a problem behind pass@k in the report (paper: 32)")


# Only what differs from the defaults above. (For which machine each is: MACHINES, section 16.)
SMALL_GPU = {
    "model": "Qwen/Qwen2.5-0.5B-Instruct",
    "n": 16,
    "student_group": 16,
    "teacher_warmup": 3,
    "checkpointing": True,
    "micro_tokens": 8192,
}
PRESETS = {
    # Small datasets differ more in their topics than large ones, and eight of them with three
    # students each average the noise. (With four of 32 problems, two students and --teacher-lr 5e-4
    # the share of products hardly moved.) Rewards are about ten times the paper's here, so --kl has
    # to be larger, too: with 0.001 teachers forgot right answers and ended at sheets of one item.
    # With fewer inner steps the students of some worlds gain nothing that could be measured.
    "tiny": {
        "model": "tiny",
        "pool": 256,
        "temperature": 0.7,
        "teacher_tokens": 40,
        "student_tokens": 24,
        "steps": 10,
        "teacher_batch": 2,
        "n": 16,
        "teacher_lr": 1e-3,
        "teacher_warmup": 0,
        "kl": 0.01,
        "repeats": 3,
        "inner_steps": 22,
        "inner_extra": 0,
        "student_batch": 16,
        "student_group": 16,
        "student_lr": 7e-4,
        "micro_tokens": 1024,
    },
    "class": SMALL_GPU
    | {
        "steps": 10,
        "repeats": 1,
        "inner_steps": 8,
        "pool": 300,
        "student_tokens": 320,
        "teacher_tokens": 192,
    },
    "long": SMALL_GPU
    | {
        "steps": 30,
        "repeats": 2,
        "pool": 1000,
        "student_tokens": 512,
        "teacher_tokens": 256,
    },
    "paper": {"teacher_batch": 2, "checkpointing": True, "sample_tokens": 262144},
    "smoke": {
        "fail_k": 2,
        "pool": 16,
        "steps": 1,
        "n": 2,
        "teacher_group": 2,
        "repeats": 1,
        "inner_steps": 1,
        "student_batch": 2,
        "student_group": 4,
        "student_tokens": 48,
        "teacher_tokens": 96,
        "reward_questions": 4,
        "eval_samples": 2,
        "sample_tokens": 8192,
        "micro_tokens": 2048,
    },
}


# ======== 2. The outer loop: how do the parts make Algorithm 1? ===================================

# An outer step is points 1 to 4 of Algorithm 1. All that passes to the next one is the State: the
# teacher phi, the baseline theta, and the books.
#
# Why promote? An inner loop is short, so that many datasets can be tried. That is enough to see
# which of them helps, but not to solve hard problems, and without promotion each student is thrown
# away when it has been measured. Promotion banks progress: the next students begin where this one
# ended, and problems that were out of its reach come into reach. It has a price. Rewards are gains
# over the baseline; so they drop after a promotion, and the teacher has to find what helps the
# better student.
#
# Why a moving average? The mean reward of one step is noisy: it hangs on M questions, and on what
# the students happened to sample. The mean of three steps is less so. (It is no more than that: a
# single large reward can lift the mean of all three above tau.) Why a dataset of this step, and not
# the best one ever? The window shows that the teacher is good NOW, and the weights of earlier
# students are gone. So the promoted student may gain less than those that earned the promotion.
#
# Why the median student of the best dataset? A student's gain has a share of chance, and the best
# of r has the most of it. The median student shows what the dataset does. For an even r the better
# of the two in the middle is taken: of the paper's four students the second best, and with r = 2
# simply the better one; with r = 1 there is no choice. Nor does the median help against the choice
# of the dataset: the largest of K noisy means is larger than what it measures, too.
#
# One step in numbers, with K = 2, r = 3 and M = 4 questions, of which theta answers one:
#     students of X_1 answer 3, 1, 2 of 4:    R_1j = 0.5, 0, 0.25    R_1 =  0.25
#     students of X_2 answer 1, 1, 0 of 4:    R_2j = 0, 0, -0.25     R_2 = -0.08
# The mean reward is 0.08. If its average over three steps is above tau, the third student of X_1 is
# promoted (0.25 is the median). A_1 = 0.25 + 0.08 = 0.33 and A_2 = -0.33: all completions that X_1
# was written with become likelier, and all those of X_2 less likely.
#
# The tiny world is quicker than the paper: two or three promotions mostly lead from 0 to 60-100 %,
# since all facts hang on one switch, from the forum's way of answering to the textbook's. The
# paper's students gain a few points by each of at most four promotions, in 200 steps.


@dataclass
class State:
    """All that passes from one outer step to the next; the checkpoint is this and nothing else."""

    teacher: list  # phi, a snapshot
    moments: dict  # of the teacher's AdamW
    baseline: list  # theta, the weights that every student starts from
    inputs: str = ""  # fingerprint of all that was given beside flags: model, prompts, hard set
    step: int = 0
    promotions: int = 0
    best_accuracy: float = -1.0  # of the promoted students, greedy, on the whole hard train set
    student_key: str = ""  # fingerprint of the one that is saved
    history: list[float] = field(default_factory=list)  # mean rewards since the last promotion
    # The lines of the .jsonl files:
    log: list[dict] = field(default_factory=list)  # a row an outer step
    questions: list[dict] = field(default_factory=list)  # every problem of the teacher
    promotion_questions: list[dict] = field(default_factory=list)  # D_best


@dataclass
class Champion:
    """The median student of a step's best dataset: if a promotion is due, the new baseline."""

    dataset: int
    student: int
    weights: list


def outer_step(policy: Policy, hard_train: list[Problem], state: State, config: Config) -> dict:
    """One step of Algorithm 1, in place on `state` -> its row of the log, also in state.log."""
    step = state.step
    n = config.n
    # 1. The teacher proposes K * n problems; consecutive ones make the datasets X_1..X_K.
    count = config.teacher_batch * config.teacher_group * n
    restore(policy.model, state.teacher)
    generator = seeded(config.seed, "propose", step)
    rollouts, problems, proposing = propose(policy, count, config, generator)
    datasets = [problems[i : i + n] for i in range(0, count, n)]
    # 2. What is each dataset worth? The questions Q_R are drawn anew in each step.
    if config.reward == "grounded":
        order = torch.randperm(
            len(hard_train), generator=seeded(config.seed, "reward questions", step)
        )
        questions = [hard_train[i] for i in order[: config.reward_questions]]
        measured = grounded_rewards(policy, datasets, questions, state, config)
    else:
        measured = learnability_rewards(policy, datasets, state, config)
    rewards, errors, champion, training = measured  # errors: standard errors of the rewards
    R = rewards.mean(1)  # [K]: R_k
    # 3. Promotion, when the baseline is beaten lastingly.
    state.history = [*state.history, R.mean().item()]
    average = float(np.mean(state.history[-config.window :]))
    promoted = None
    if champion and promotion_due(state.history, config):
        promoted = promote(policy, champion, datasets, hard_train, state, config)
    # 4. The action was a whole dataset, so each rollout that wrote a part of X_k carries A_k.
    advantages = rloo_advantages(R, config.teacher_group).repeat_interleave(n)  # [K * n]
    updating = teacher_update(policy, rollouts, advantages, state, config)
    row = {
        "step": step,
        "rewards": rewards.tolist(),
        "errors": errors.tolist(),
        "reward": R.mean().item(),
        "average": average,
        "promotion": promoted,
        "teacher": proposing | updating,
        "student": training,
    }
    if config.dataset == "tiny":
        row["topics"] = topic_shares(problems)
    state.log.append(row)
    for i, problem in enumerate(problems):
        place = {"step": step, "dataset": i // n, "reward": R[i // n].item()}
        state.questions.append(place | vars(problem))
    state.step += 1
    return row


def promotion_due(history: list[float], config: Config) -> bool:
    """Is the mean of the last `window` steps' mean rewards above tau? (Algorithm 1)

    The paper is silent on two things. Rewards are measured against a baseline, so those from before
    a promotion say nothing about the new one: `history` starts anew. And the window must be full.
    """
    if not config.promotion or len(history) < config.window:
        return False
    return sum(history[-config.window :]) / config.window > config.tau


def promote(
    policy: Policy,
    champion: Champion,
    datasets: list[list[Problem]],
    hard_train: list[Problem],
    state: State,
    config: Config,
) -> dict:
    """Algorithm 1, point 3: the champion becomes the baseline, its dataset joins D_best.

    -> its row of the log. The best student so far, by greedy accuracy on the hard train set, is
    saved in the run folder.
    """
    state.baseline = champion.weights
    state.promotions += 1
    state.history = []
    state.promotion_questions += map(vars, datasets[champion.dataset])
    restore(policy.model, state.baseline)
    accuracy = greedy_right(policy, hard_train, config).mean().item()
    if accuracy > state.best_accuracy:
        state.best_accuracy = accuracy
        state.student_key = weights_key(state.baseline)
        save_model(policy.model, policy.tokenizer, Path(config.out) / "student")
    return {"dataset": champion.dataset, "student": champion.student, "accuracy": accuracy}


def teacher_update(
    policy: Policy, rollouts: list[Rollout], advantages: Tensor, state: State, config: Config
) -> dict:
    """Algorithm 1, point 4, on the live model -> figures. advantages [K * n].

    The teacher's moments are on the model's device only here: the students have their own.
    """
    device = policy.model.device
    moments = moved_to(device, state.moments)
    state.moments = {}  # or the host would hold these beside the new ones: 16 bytes a weight
    lr = learning_rate(config.teacher_lr, state.step, config.steps, config.teacher_warmup)
    rounding = seeded(config.seed, "teacher", state.step, "rounding", device=device)
    restore(policy.model, state.teacher)
    figures = policy_update(policy, rollouts, advantages, moments, lr, config, rounding)
    state.moments = moved_to("cpu", moments)
    state.teacher = snapshot(policy.model)
    return figures


# ======== 3. The teacher: which of its problems are used, and is rejecting the others a bias? =====

# The teacher is asked the same thing each time: write one problem and its answer. It sees no hard
# problem, and no examples either: shown some, it copies them (paper, appendix). What it learns, it
# learns from rewards alone. Its completion must hold a question and an answer that the verifier can
# read; otherwise it is thrown away and drawn again. Whether the answer is right nobody checks, so
# to the student "right" means: equal to what the teacher says. That may be wrong, and the paper
# finds that it matters less than that the question is well-posed. A student that trains on wrong
# keys still learns to read such questions, to reason about them and to give an answer.


@dataclass(frozen=True)
class Problem:
    question: str
    answer: str  # LaTeX, without \boxed{} and without $


TEACHER_PROMPT = """You write practice problems for a mathematics assistant that wants to improve.

Invent exactly one new problem, from one of these subjects: Algebra, Counting and Probability,
Geometry, Intermediate Algebra, Number Theory, Prealgebra, Precalculus. It must be original and
challenging: a solution takes at least two or three steps. Then solve it yourself. Give the result
in exactly this form, with all other text outside of the tags:

<question>the problem</question><answer>\\boxed{the final answer}</answer>

"""


def parse_problem(text: str) -> Problem | None:
    r"""The problem in a teacher's completion, or None where there is none that can be used.

    It can be used (paper, section 3) if question and answer tags open and close, the answer has a
    box, and the verifier can read what is in it. Of several problems only the first question that
    is directly followed by its own answer is looked at.

    The text is cut before each opening tag, so that a question's part is followed by its answer's.
    Both end at the first closing tag of their own. This takes linear time.
    (One regular expression for all of it would pair a question with another one's answer, and would
    take minutes for a thousand repeated tags.)

    >>> two = r"<question>1?</question> <question>2+3?</question> <answer>\boxed{5}</answer>"
    >>> parse_problem(two)
    Problem(question='2+3?', answer='5')
    """
    parts = re.split(r"(?=<question>|<answer>)", text)
    for part, following in pairwise(parts):
        question = re.match(r"<question>(.*?)</question>", part, re.DOTALL)
        answer = re.match(r"<answer>(.*?)</answer>", following, re.DOTALL)
        if question and answer:
            boxed = extract_boxed(answer[1])
            if not question[1].strip() or boxed is None or not parses(boxed):
                return None
            return Problem(question[1].strip(), boxed.strip())
    return None


def propose(
    policy: Policy, count: int, config: Config, generator: torch.Generator
) -> tuple[list[Rollout], list[Problem], dict]:
    """Samples the live model as the teacher until `count` problems are accepted.

    -> (their rollouts, the problems, figures). Raises UserError where hardly any can be used.

    Proposition 1 (of the paper): this rejection needs no correction. Let pi_0 be the teacher, and
    pi what is drawn by sampling it until the completion is in the accepted set S. Then, on S,

        ln pi(y)             = ln pi_0(y) - ln pi_0(S)
        sum_i A_i grad ln pi = sum_i A_i grad ln pi_0 - (sum_i A_i) grad ln pi_0(S)

    for accepted completions y_i with advantages A_i. The update of section 6 computes the first sum
    on the right. The other is zero, since RLOO's advantages sum to zero in each group. In plain
    REINFORCE the rewards themselves take the place of A_i, and the correction would be needed.
    (What the KL term does to this is told in policy_update.)
    """
    prompt = policy.teacher_prompt()
    opening = ""
    if policy.teacher_text.rstrip().endswith("<question>"):  # a prompt may open the tag itself
        opening = "<question>"
    rollouts = []
    problems = []
    tried = truncated = 0
    last = ""
    while len(problems) < count:
        if tried >= 20 * count + 100:
            raise hopeless_teacher(policy, len(problems), tried, truncated, last)
        missing = count - len(problems)
        drawn = sample(policy, [prompt], missing, config.teacher_tokens, config, generator)
        tried += len(drawn)
        last = drawn[-1].text
        truncated += sum(rollout.truncated for rollout in drawn)
        for rollout in drawn:
            problem = parse_problem(opening + rollout.text)
            if problem:
                rollouts.append(rollout)
                problems.append(problem)
    lengths = [len(rollout.completion) for rollout in rollouts]
    figures = {
        "acceptance": count / tried,
        "truncated": truncated / tried,
        "length": float(np.mean(lengths)),
    }
    return rollouts, problems, figures


# ======== 4. The student: what does it do with a dataset? =========================================

# A student is a copy of the baseline that takes a few steps of reinforcement learning with
# verifiable rewards (RLVR) on one dataset: it attempts each problem several times, and a program,
# not a model, compares the answers with the dataset's. Its optimizer is fresh, and lives as long as
# it does. The verifier (section 13) is one promise: answers_equal(prediction, gold) is True if both
# texts are the same mathematics, such as 1/2 and \frac{1}{2}; it never raises, and it depends on
# nothing but the two texts.

STUDENT_PROMPT = """User: {problem}
Think step by step, and end with the final answer inside \\boxed{}.

Assistant:"""

RIGHT = 120.0  # reward of a right answer (paper, section 3)
MAX_GUESSES = 10  # formulas outside the last box that can earn the partial reward


def student_reward(completion: str, gold: str) -> float:
    r"""120 for a right box; 20 for a wrong one, if one of up to ten other formulas is right; 10 for
    any box; else 0 (paper, section 3).

    The small rewards teach to put an answer into a box. Clipping and AdamW take out the scale, so
    120 is not too large; but beside it the paper's --kl 0.001 hardly counts.

    >>> student_reward(r"\boxed{7}", "7"), student_reward(r"$7$, so \boxed{8}", "7")
    (120.0, 20.0)
    >>> student_reward(r"\boxed{8}", "7"), student_reward("7", "7")
    (10.0, 0.0)
    """
    boxed = list(islice(boxes(completion), 1 + MAX_GUESSES))  # the last one first
    if not boxed:
        return 0.0
    if answers_equal(boxed[0], gold):
        return RIGHT
    formulas = re.findall(r"\$([^$]{1,200})\$|\\\((.{1,200}?)\\\)", completion)
    guesses = [dollars or brackets for dollars, brackets in reversed(formulas)]
    guesses = (guesses + boxed[1:])[:MAX_GUESSES]
    if any(answers_equal(guess, gold) for guess in guesses):
        return 20.0
    return 10.0


def solve(
    policy: Policy,
    problems: list[Problem],
    attempts: int,
    config: Config,
    generator: torch.Generator | None = None,
) -> tuple[list[Rollout], Tensor]:
    """The live model's attempts at some problems: `attempts` at the first, then at the second, ...

    -> (rollouts, rewards float64 [len(problems) * attempts]). Without a generator they are greedy.
    """
    prompts = [policy.student_prompt(problem) for problem in problems]
    rollouts = sample(policy, prompts, attempts, config.student_tokens, config, generator)
    policy.meter("grading")
    rewards = []
    for i, rollout in enumerate(rollouts):
        rewards.append(student_reward(rollout.text, problems[i // attempts].answer))
    policy.meter("other")
    return rollouts, torch.tensor(rewards, dtype=torch.float64)


def greedy_right(policy: Policy, problems: list[Problem], config: Config) -> Tensor:
    """[len(problems)] float64: 1 where the live model's greedy answer is right, else 0.

    Greedy, because it has no sampling noise.
    """
    rewards = solve(policy, problems, 1, config)[1]
    return (rewards == RIGHT).double()


def batches_of(
    dataset: list[Problem], steps: int, size: int, generator: torch.Generator
) -> list[list[Problem]]:
    """`steps` batches of `size` problems: the dataset over and over, each time in a new order.

    A batch may span two epochs.
    """
    order = []
    while len(order) < steps * size:
        order += torch.randperm(len(dataset), generator=generator).tolist()
    batches = []
    for step in range(steps):
        batches.append([dataset[i] for i in order[step * size : (step + 1) * size]])
    return batches


def train_student(
    policy: Policy, batches: list[list[Problem]], config: Config, key: tuple
) -> list[dict]:
    """The inner loop: one RLOO step on each batch, in place on the live model -> their figures.

    `key` names this student, and all its random choices are a function of it.
    """
    moments = adamw_state(policy.model)
    figures = []
    for step, batch in enumerate(batches):
        lr = learning_rate(config.student_lr, step, len(batches), config.student_warmup)
        figures.append(student_step(policy, batch, moments, lr, config, (*key, step)))
    return figures


def student_step(
    policy: Policy, batch: list[Problem], moments: dict, lr: float, config: Config, key: tuple
) -> dict:
    """One RLOO step: G attempts at each problem, compared with each other -> figures."""
    G = config.student_group
    rollouts, rewards = solve(policy, batch, G, config, seeded(*key))
    advantages = rloo_advantages(rewards, G)  # [len(batch) * G]
    rounding = seeded(*key, "rounding", device=policy.model.device)
    figures = policy_update(policy, rollouts, advantages, moments, lr, config, rounding)
    flat = (advantages.view(-1, G) == 0).all(1)
    return figures | {
        "reward": rewards.mean().item(),
        "success": (rewards == RIGHT).double().mean().item(),
        "flat_groups": flat.double().mean().item(),
        "truncated": float(np.mean([rollout.truncated for rollout in rollouts])),
        "length": float(np.mean([len(rollout.completion) for rollout in rollouts])),
    }


# ======== 5. The grounded reward: what is a dataset worth? ========================================

# A dataset is worth what a student gains by it. Nobody looks at the problems: not whether they are
# hard, new or right. To learn what X_k is worth, a copy of the baseline trains on it, and answers
# M real hard problems before and after. All students of a step get the same questions, start from
# the same weights and take the same number of steps, so that their gains differ by their datasets
# and by luck: the order of the problems, the sampled attempts. Averaging over r students makes
# luck smaller, but does not remove it; it is the noise that the teacher has to learn through.
#
# The alternative is a reward that needs no student to train (Intrinsic-T): a problem is worth most
# when the student solves it rarely, but sometimes. The paper finds that a teacher which is paid for
# that loses its diversity: it ends with a few kinds of problems. In the tiny world you can watch
# it: --reward learnability.


def grounded_rewards(
    policy: Policy,
    datasets: list[list[Problem]],
    questions: list[Problem],
    state: State,
    config: Config,
) -> tuple[Tensor, Tensor, Champion, dict]:
    """Algorithm 1, point 2: r students train on each of K datasets, and answer M hard questions.

    -> (rewards R_kj [K, r]; their standard errors over the questions [K, r], so without the noise
    of the students; the champion, for point 3; figures). At most r + 2 students are in memory.
    """
    K = len(datasets)
    r = config.repeats
    steps = config.inner_steps + config.inner_extra * state.promotions
    restore(policy.model, state.baseline)
    # Measured once. Even of the base model it need not be 0: a problem that was failed 128 times at
    # --temperature may be right in the greedy answer.
    before = greedy_right(policy, questions, config)  # [M]
    jobs = []
    for k in range(K):
        for j in range(r):
            jobs.append((datasets[k], (config.seed, "student", state.step, k, j)))
    common = (state.baseline, questions, steps, config)
    students = share(policy, try_dataset, common, jobs, f"step {state.step}: students")
    gains = []
    logs = []
    best = -math.inf
    for k in range(K):
        weights = []
        rewards = []
        for _ in range(r):
            right, trained, log = next(students)
            gains.append(right - before)  # [M]
            rewards.append(gains[-1].mean().item())  # R_kj
            weights.append(trained)
            logs += log
        if sum(rewards) > best:
            best = sum(rewards)
            j = median_student(rewards)
            champion = Champion(k, j, weights[j])
    gains = torch.stack(gains).view(K, r, -1)  # [K, r, M]
    errors = gains.std(-1, correction=0) / gains.shape[-1] ** 0.5
    figures = {name: float(np.mean([log[name] for log in logs])) for name in logs[0]}
    figures["accuracy_before"] = before.mean().item()
    return gains.mean(-1), errors, champion, figures


def try_dataset(
    policy: Policy,
    baseline: list,
    questions: list[Problem],
    steps: int,
    config: Config,
    dataset: list[Problem],
    key: tuple,
) -> tuple[Tensor, list, list[dict]]:
    """One student, from the baseline -> (which questions it has right [M], its weights, figures).

    A function of its arguments alone, so any process can do it.
    """
    policy.meter("weight swaps")
    restore(policy.model, baseline)
    batches = batches_of(dataset, steps, config.student_batch, seeded(*key, "order"))
    figures = train_student(policy, batches, config, key)
    policy.meter("weight swaps")
    weights = snapshot(policy.model)
    return greedy_right(policy, questions, config), weights, figures


def median_student(rewards: list[float]) -> int:
    """Index of the median; of the two middle ones, where r is even, that of the better one.

    >>> median_student([0.1, 0.2, 0.3]), median_student([0.4, 0.1, 0.3, 0.2])     # 0.2 and 0.3
    (1, 2)
    """
    order = sorted(range(len(rewards)), key=rewards.__getitem__)
    return order[len(order) // 2]


LEARNABILITY_SAMPLES = 32  # completions a problem (paper, section 5)


def learnability_rewards(
    policy: Policy, datasets: list[list[Problem]], state: State, config: Config
) -> tuple[Tensor, Tensor, None, dict]:
    """Intrinsic-T, the method to compare with: no student trains.

    A problem is worth 1 - s, where s is the share of the student's attempts that are right, or 0 if
    s = 0 (paper, section 5).

    -> as grounded_rewards: (rewards [K, 1], standard errors over the dataset's problems [K, 1], no
    champion, figures).
    """
    jobs = []
    for k, dataset in enumerate(datasets):
        jobs.append((dataset, (config.seed, "learnability", state.step, k)))
    common = (state.baseline, config)
    students = share(policy, success_rates, common, jobs, f"step {state.step}: attempts")
    rates = torch.stack(list(students))  # [K, n]
    values = torch.where(rates > 0, 1 - rates, 0.0)
    errors = values.std(1, correction=0, keepdim=True) / values.shape[1] ** 0.5
    return values.mean(1, keepdim=True), errors, None, {"success": rates.mean().item()}


def success_rates(
    policy: Policy, baseline: list, config: Config, dataset: list[Problem], key: tuple
) -> Tensor:
    """[n] float64: the share of the baseline student's attempts at each problem that are right."""
    restore(policy.model, baseline)
    rewards = solve(policy, dataset, LEARNABILITY_SAMPLES, config, seeded(*key))[1]
    return (rewards == RIGHT).double().view(len(dataset), LEARNABILITY_SAMPLES).mean(-1)


# ======== 6. RLOO and the policy update: which way do rewards push the weights? ===================

# Teacher and student learn by the same rule. An action is made more likely if it earned more than
# the others of its group, and less likely if it earned less. For the student an action is one
# attempt, and the group are the attempts at the same problem. For the teacher the action is a whole
# dataset: its n problems were written independently of each other, ln p of the dataset is the sum
# of theirs, and so each of its n completions carries the advantage A_k of the dataset. The teacher
# is never told which of the problems did the good.
#
# Where all rewards of a group are equal, every advantage is zero, and nothing is learnt. That is
# the plateau. A problem that was failed 128 times of 128 is probably right less than once in a
# hundred attempts, perhaps never; so in nearly all groups there is no 120. What can differ is the
# small change: 0 without a box, 10 with one, 20 for a right formula elsewhere. A student that
# trains on the hard problems alone (Hard-Only, a row of eval.py) learns that first, and then has
# nothing to prefer until it meets a right answer. In the tiny world it meets none in a million
# attempts (section 11 says what was done for that); in the paper it gains a little. Practice
# problems that it solves now and then give it something to prefer, and what it learns there may
# carry over.


def rloo_advantages(rewards: Tensor, group_size: int) -> Tensor:
    """REINFORCE leave-one-out: A_i = reward_i - mean of the OTHER rewards of its group. [B] -> [B].

    Groups are consecutive. The others' mean does not depend on action i, so to subtract it leaves
    the gradient unbiased; where rewards are far from zero it makes the variance much smaller. No
    division by the standard deviation. Advantages sum to zero over a group.

    >>> rewards = torch.tensor([120., 0., 0., 10., 10., 10.])
    >>> rloo_advantages(rewards, 3).tolist()            # the others' means: 0, 60, 60
    [120.0, -60.0, -60.0, 0.0, 0.0, 0.0]
    """
    groups = rewards.view(-1, group_size)  # [B / G, G]
    others = (groups.sum(1, keepdim=True) - groups) / (group_size - 1)
    return (groups - others).flatten()


def policy_update(
    policy: Policy,
    rollouts: list[Rollout],
    advantages: Tensor,
    moments: dict,
    lr: float,
    config: Config,
    rounding: torch.Generator | None = None,
) -> dict:
    """One step up the gradient of  E[reward] - kl * KL(policy, reference) -> figures.

    loss = -1/B sum_i w_i ln p_i,   w_i = A_i - kl * k1_i, held constant,   k1_i = ln p_i - ln ref_i

    ln p_i sums over the tokens of completion i, EOS included. The minus makes a loss of it: where
    A_i > 0, a smaller loss is a larger ln p_i. B counts all rollouts, also where they are cut into
    micro-batches, which therefore do not change the gradient. (The teacher's B is K * n, while its
    actions are K datasets. So its loss is 1/n of the dataset's, and clipping and AdamW hardly see
    the difference.)

    The KL term: KL = E[k1] over completions of the policy, and  grad E[k1] = E[k1 grad ln p] +
    E[grad ln p],  whose second part is zero. So k1 in the weights, as a reward that is subtracted,
    gives the right gradient, and k1 as a loss gives none. (Others put k2 = k1^2 / 2 into the loss,
    which gives the same gradient, or k3 = 1/e^k1 - 1 + k1, which gives that of KL(ref || p).)

    Two things are not exact. Rollouts with advantage zero are left out, to save two passes of the
    model each: so the KL term pulls only where rewards do. And the weights do not sum to zero any
    more, on which Proposition 1 rests:  kl * (sum_i k1_i) grad ln pi_0(S)  is missing in the
    teacher's update. That is nothing where all completions are accepted, and little where kl * k1
    is small beside the rewards: in a toy that a test enumerates, with rewards of about 0.3 and 69 %
    accepted, 0.07 % of the gradient's length at kl = 0.001, and 16 % at 0.5. (In the rewards,
    before RLOO, the KL term would be covered. But then all log-probabilities of a group are needed
    before the first backward pass.)
    """
    active = advantages.nonzero()[:, 0].tolist()
    if not active:
        return {"grad_norm": 0.0, "kl": 0.0, "sampler_gap": 0.0}
    policy.meter("training")
    policy.model.train(config.checkpointing)  # checkpointing works in train mode only
    divergences = []
    gaps = []
    for indices in micro_batches(rollouts, active, config.micro_tokens):
        batch = [rollouts[i] for i in indices]
        # 1. Log-probabilities, of the policy with gradient, of the reference without.
        logprobs = completion_logprobs(policy.model, batch, config.temperature)  # [b]
        # 2. Weights: advantages, less the KL term.
        weights = advantages[indices].to(logprobs)  # [b]
        if config.kl:
            with torch.no_grad():
                reference = completion_logprobs(policy.reference, batch, config.temperature)
                k1 = logprobs - reference  # [b]
            weights = weights - config.kl * k1
            divergences += k1.tolist()
        # 3. The gradients of all micro-batches add up to that of the whole batch.
        loss = -(weights * logprobs).sum() / len(rollouts)
        loss.backward()
        gaps += sampler_gaps(batch, logprobs)
    policy.model.eval()
    policy.meter.tokens["trained"] += sum(len(rollouts[i].completion) for i in active)
    norm = adamw_step(policy.model, moments, lr, config, rounding)
    policy.meter("other")
    kl = float(np.mean(divergences or [0.0]))
    return {"grad_norm": norm, "kl": kl, "sampler_gap": float(np.mean(gaps))}


def sampler_gaps(batch: list[Rollout], logprobs: Tensor) -> list[float]:
    """|ln p as trained - ln p as sampled| of each rollout, divided by its tokens, in nats.

    Both are of the same weights. With a 135M model they differ by 1e-6 in float32 and by 0.01 in
    bfloat16, since two kernels round differently; the ratio of the two could correct that, and at
    this size it is left out. Much more is a bug, in the sampler or here.
    """
    lengths = torch.tensor([len(rollout.completion) for rollout in batch]).to(logprobs)  # [b]
    sampled = torch.tensor([rollout.logprob for rollout in batch]).to(logprobs)  # [b]
    return ((logprobs.detach() - sampled).abs() / lengths).tolist()


def completion_logprobs(
    model: nn.Module, rollouts: list[Rollout], temperature: float, rows: int = 512
) -> Tensor:
    """[B] float32: ln p(completion | prompt) of each rollout, at the temperature of its sampling.

    Full logits [B, T, V] never exist: with V = 128,000 they are the first thing that does not fit.
    Hidden states are reduced to the positions that predict a completion token, and these are
    projected `rows` at a time, and once more in the backward pass (checkpoint), never all at once.
    """
    device = model.device
    prompt_lengths = [len(rollout.prompt) for rollout in rollouts]
    sequences = [rollout.prompt + rollout.completion for rollout in rollouts]
    lengths = [len(sequence) for sequence in sequences]
    B = len(rollouts)
    T = max(lengths)
    # Padded on the RIGHT, where causal attention never looks: no mask is needed, and positions
    # count from 0.
    padded = [sequence + [0] * (T - len(sequence)) for sequence in sequences]
    ids = torch.tensor(padded, device=device)  # [B, T]
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state  # [B, T, D]
    # Position t predicts token t + 1. Prompt a b, completion c EOS: start = 2, end = 4, and c and
    # EOS are predicted by the hidden states at 1 and 2, that is from start - 1 to end - 2. N is the
    # number of such tokens in all rollouts.
    start = torch.tensor(prompt_lengths, device=device)[:, None]  # [B, 1]
    end = torch.tensor(lengths, device=device)[:, None]  # [B, 1]
    column = torch.arange(T - 1, device=device)
    predicts = (start - 1 <= column) & (column < end - 1)  # [B, T - 1]
    hidden = hidden[:, :-1][predicts]  # [N, D]
    targets = ids[:, 1:][predicts]  # [N]

    def project(h: Tensor, y: Tensor) -> Tensor:  # [rows, D], [rows] -> [rows]
        logits = next_token_logits(model, h).float()  # softmax in float32
        return (logits / temperature).log_softmax(-1).gather(-1, y[:, None])[:, 0]

    logprobs = []
    for h, y in zip(hidden.split(rows), targets.split(rows)):
        logprobs.append(checkpoint(project, h, y, use_reentrant=False))
    owner = predicts.nonzero()[:, 0]  # [N]: whose token it is
    return torch.zeros(B, device=device).index_add(0, owner, torch.cat(logprobs))


# That was SOAR. What follows is what it runs on.


# ======== Part II: what SOAR runs on ==============================================================


# ======== 7. Policy: what is it that plays the teacher and the students? ==========================

# A Policy is one live model with its tokenizer, its prompts and a frozen copy for the KL term. The
# weights of teacher and students are copied into it in turn, and the rest of the program works on
# whatever is in there. Most of this section is about loading, since there a run can go wrong
# without a word. transformers fills missing weights with random numbers, the tokenizer of another
# model gives ids like any other, and a model with dropout, or with a cap on its logits, could be
# trained as another policy than the one that is sampled. Rewards would still come, for nothing. So
# all that is refused before the long work begins: by a message that says what is wrong, and else by
# self_check, which knows no fault by name and compares what is sampled with what is trained.


@dataclass
class Policy:
    """ONE live model, in which teacher and students take turns, and what talking to it takes."""

    model: nn.Module
    reference: nn.Module | None  # the frozen base model, for the KL term
    tokenizer: object
    teacher_text: str
    student_text: str  # contains {problem}
    chat: bool
    base: list[Tensor]  # the weights that the run starts from, in host memory
    meter: Meter
    source: tuple = ()  # what it was loaded with: (folder or hub id, Config)
    workers: list = field(default_factory=list)  # channels to the other processes (section 15)

    def encode(self, text: str) -> list[int]:
        """The token ids of a prompt. UserError where the model has no vector for one of them."""
        if self.chat:
            ids = chat_ids(self.tokenizer, text)
        else:
            ids = self.tokenizer(text).input_ids  # with BOS where the tokenizer has one
            eos = self.tokenizer.eos_token_id
            if ids and ids[-1] == eos and not text.endswith(self.tokenizer.eos_token):
                # Some tokenizers end every text: the model would have nothing left to say.
                ids = ids[:-1]
        rows = embedding_rows(self.model)
        if not ids or max(ids) >= rows:
            raise UserError(
                f"the tokenizer and the model do not belong together: the prompt {text[:40]!r}... "
                f"becomes the ids {ids[:3]}..., and the model knows the ids 0 to {rows - 1}"
            )
        return ids

    def teacher_prompt(self) -> list[int]:
        """The token ids that every proposal of the teacher answers."""
        return self.encode(self.teacher_text)

    def student_prompt(self, problem: Problem) -> list[int]:
        """The token ids that ask for a solution. (No format(): LaTeX is full of {}.)"""
        return self.encode(self.student_text.replace("{problem}", problem.question))


def snapshot(model: nn.Module) -> list[Tensor]:
    """A copy of all weights in host memory. Tied weights (embedding, output layer) appear once."""
    return [p.detach().to("cpu", copy=True) for p in model.parameters()]


@torch.no_grad()
def restore(model: nn.Module, weights: list[Tensor]) -> None:
    """Copies a snapshot back IN PLACE, so that whoever holds the parameters sees the new values."""
    for p, w in zip(model.parameters(), weights, strict=True):
        p.copy_(w)


def load_policy(path: str, config: Config, meter: Meter) -> Policy:
    """The model in `path` as a policy that has passed self_check. Raises UserError."""
    from transformers import GenerationConfig

    model, tokenizer = load_model(path, config)
    words = len(tokenizer.get_vocab())
    rows = embedding_rows(model)
    if words < rows / 2:  # some versions of transformers make an empty one of missing files
        raise UserError(
            f"the tokenizer of {path} has {words} tokens and the model {rows}: they do not belong "
            "together, or files are missing; get the model again from where it was published"
        )
    # Of the hub's generation settings only the ids are kept. Others (top_p, a temperature) would
    # be saved with the promoted student, where transformers can refuse them.
    model.generation_config = GenerationConfig(
        bos_token_id=model.generation_config.bos_token_id,
        pad_token_id=model.generation_config.pad_token_id,
        eos_token_id=end_ids(model, tokenizer, config.chat),
    )
    without_dropout(model)
    if config.checkpointing:
        enable_checkpointing(model)
    teacher_text = TEACHER_PROMPT
    student_text = STUDENT_PROMPT
    if config.dataset == "tiny":
        teacher_text = TINY_TEACHER_PROMPT
        student_text = TINY_STUDENT_PROMPT
    policy = Policy(
        model,
        copy.deepcopy(model) if config.kl else None,
        tokenizer,
        read_prompt(config.teacher_prompt, teacher_text),
        read_prompt(config.student_prompt, student_text, "{problem}"),
        config.chat,
        snapshot(model),
        meter,
        (path, config),
    )
    self_check(policy, config)
    return policy


def load_model(path: str, config: Config, trained: bool = True) -> tuple[nn.Module, object]:
    """(model, tokenizer) from the hub or a folder, in eval mode.

    trained=False is for a model that only reads (eval.py's --embedder): it needs no output layer.
    Raises UserError when there is no such model, it is gated, its weights are not those that its
    configuration speaks of, or the network or the device is missing.
    """
    from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

    use_own_attention()
    if Path(path, "adapter_config.json").exists():
        raise UserError(
            f"{path} holds an adapter (LoRA), which soar.py does not apply; merge it into its model"
        )
    kind = AutoModelForCausalLM if trained else AutoModel
    device = choose_device(config)
    try:
        torch.zeros(1, device=device).item()  # is the device there?
        # trust_remote_code: left open, transformers would ask, and wait for an answer.
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        model, found = kind.from_pretrained(
            path, dtype=choose_dtype(device), output_loading_info=True, trust_remote_code=False
        )
        model = model.to(device).eval()
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:  # missing, gated, offline, truncated: transformers raises all kinds
        raise UserError(
            f"the model {path} cannot be loaded with --device {device} ({first_line(error)}); give "
            "a complete local folder, or a hub id (needs the network once and, if the model is "
            "gated, a login)"
        ) from None
    # transformers fills what is missing with random numbers, and runs.
    faults = ["missing_keys", "mismatched_keys"]
    if trained:
        faults.append("unexpected_keys")
    for fault in faults:
        names = sorted(map(str, found[fault]))
        if names:
            raise UserError(
                f"the weights of {path} do not fit its config.json: {len(names)} {fault}, for "
                f"instance {names[0]}; get the model again from where it was published"
            )
    return model, tokenizer


def choose_device(config: Config) -> str:
    """--device; if that is auto, cuda where torch can use a GPU, else cpu.

    The tiny model is for CPUs, since its kernels take a GPU less time than it takes to start them.
    Raises UserError where a CPU would need weeks, and nobody has asked for it.
    """
    if config.device != "auto":
        return config.device
    if config.model == "tiny":
        return "cpu"
    if torch.cuda.is_available():
        return "cuda"
    if config.preset in ("class", "long", "paper"):
        raise UserError(
            f"--preset {config.preset} is for a GPU, and torch finds none that it can use "
            f"({missing_gpu()}); on a CPU it would take weeks: give --preset smoke to see it work, "
            "or --device cpu if you mean it"
        )
    return "cpu"


def missing_gpu() -> str:
    """Why torch has no CUDA: no GPU, too old a driver, a build without it; "" where it has."""
    try:
        torch.cuda.init()
    except (AssertionError, RuntimeError) as error:
        return str(error).strip().split("\n")[0]
    return ""


def choose_dtype(device: str) -> torch.dtype:
    """bfloat16, but float32 where that is slow: on a CPU, and on GPUs before Ampere (sm_80).

    (Those, as the T4, are fast in float16; but its gradients need a loss scale, and a wrong one
    shows in nothing but a student that learns less.)
    """
    if torch.device(device).type == "cpu":
        return torch.float32
    if device.startswith("cuda") and torch.cuda.get_device_capability(device) < (8, 0):
        return torch.float32
    return torch.bfloat16


def read_prompt(path: str, builtin: str, must_contain: str = "") -> str:
    """The text of a prompt file; the built-in prompt where no file is given. Raises UserError."""
    text = builtin
    if path:
        text = read_text(path, "it should hold a prompt in UTF-8")
    if not text.strip() or must_contain not in text:
        raise UserError(f"the prompt file {path} must contain {must_contain or 'some text'}")
    return text


def chat_ids(tokenizer: object, user: str, assistant: str | None = None) -> list[int]:
    """Token ids of one turn of the user in the model's chat template.

    They end where the assistant begins to write, or with the assistant's turn where that is given.
    Raises UserError when there is no template or it fails.
    """
    turns = [{"role": "user", "content": user}]
    if assistant:
        turns.append({"role": "assistant", "content": assistant})
    try:
        text = tokenizer.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=not assistant
        )
    except Exception as error:  # templates are programs, and fail in their own ways
        raise UserError(
            "--chat cannot be used: the model's chat template is missing or fails "
            f"({first_line(error)}); leave --chat out"
        ) from None
    if user.strip() not in text:
        raise UserError(
            "--chat cannot be used: the model's chat template leaves out what the user says; leave "
            "--chat out"
        )
    # No special tokens are added: the template has written BOS already.
    return tokenizer(text, add_special_tokens=False).input_ids


def end_ids(model: nn.Module, tokenizer: object, chat: bool) -> list[int]:
    """Every token that ends a completion, sorted. Raises UserError when there is none.

    They are what the model's generation_config lists, the tokenizer's own EOS, and, with --chat,
    what the template writes behind the assistant's words.
    """
    ends = eos_ids(model) | {tokenizer.eos_token_id}
    ends.discard(None)  # either may have none; 0 is an id like any other
    if chat:
        begun = chat_ids(tokenizer, "Hello")
        complete = chat_ids(tokenizer, "Hello", "world")
        word = tokenizer("world", add_special_tokens=False).input_ids
        behind = complete[len(begun) + len(word) :]
        marks = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
        ends |= marks.intersection(behind[:1])  # an ordinary token, as a line break, ends no turn
    rows = embedding_rows(model)
    ends = sorted(end for end in ends if 0 <= end < rows)
    if not ends:
        raise UserError(
            "the model has no end-of-sequence token, so its completions would never end; take "
            "another"
        )
    return ends


def embedding_rows(model: nn.Module) -> int:
    """The number of ids that the model has a vector for; its tokenizer may know fewer."""
    return model.get_input_embeddings().weight.shape[0]


def without_dropout(model: nn.Module) -> None:
    """No dropout: with --checkpointing the policy that was sampled is trained in train mode.

    Modules have it under many names (p, attention_dropout, resid_pdrop, layerdrop). self_check
    refuses what this overlooks, and other noise (the jitter of some routers).
    """
    for module in model.modules():
        for name, value in vars(module).items():
            full_name = (type(module).__name__ + name).lower()
            if isinstance(value, float) and "drop" in full_name:
                setattr(module, name, 0.0)


def enable_checkpointing(model: nn.Module) -> None:
    """In train mode the backward pass computes activations again instead of keeping them.

    Raises UserError where the model cannot.
    """
    enable = getattr(model, "activation_checkpointing_enable", None)
    enable = enable or model.gradient_checkpointing_enable  # its name before transformers 5.24
    try:
        enable({"use_reentrant": False})
    except ValueError as error:
        raise UserError(
            f"--checkpointing cannot be used ({first_line(error)}); give --no-checkpointing"
        ) from None


def self_check(policy: Policy, config: Config) -> None:
    """Is the model that is trained the model that is sampled? Raises UserError if not.

    The log-probabilities of a few completions must be the same in three ways (logprob_gaps), and
    their gradient finite. Rounding makes 0.04 a token in bfloat16 and 1e-5 in float32; a cap on the
    logits, a position, a state or a dropout that one of the ways does not know makes tenths. Random
    numbers in training (dropout, a jitter of routers) make two passes differ, even where they are
    small. The check knows no model by name, so it holds for those that are still to come.
    """
    model = policy.model
    kind = f"this kind of model ({type(model).__name__})"
    try:
        gaps = logprob_gaps(policy, config)
    except Exception as error:  # other architectures fail in their own ways
        if isinstance(error, UserError) or is_out_of_memory(error):
            raise
        raise UserError(
            f"{kind} cannot be sampled and trained by soar.py ({first_line(error)}); take another "
            "--model"
        ) from None
    far = 1e-3 if model.dtype == torch.float32 else 0.15  # between rounding and a fault
    for fault, gap in gaps.items():
        allowed = far
        if fault == "trained at random":  # two passes of one way: no other rounding
            allowed = far / 100
        if not gap <= allowed:  # NaN is not, either
            raise UserError(
                f"{kind} would be {fault} by soar.py: the log-probability of a token is {gap:.2g} "
                "off; take another --model"
            )
    for name, p in model.named_parameters():
        if p.grad is not None and not torch.isfinite(p.grad).all():
            raise UserError(
                f"the gradient of {name} is NaN or infinite before any training; take another "
                "--model"
            )
        p.grad = None


def logprob_gaps(policy: Policy, config: Config) -> dict[str, Tensor]:
    """{fault: how far log-probabilities are off, a token}. It leaves a gradient in the model.

    Two prompts of different lengths, two completions each, of 8 tokens at most: so with padding, a
    cache and rows that leave. What the sampler saw, and what completion_logprobs sees in the mode
    that trains, are compared with the model's own forward pass over one sequence after the other.
    """
    model = policy.model
    temperature = config.temperature
    questions = ["What is 1+1?", "What is the sum of 1 and 2?"]
    prompts = [policy.student_prompt(Problem(question, "")) for question in questions]
    uniforms = torch.rand(4, 8, generator=seeded("self-check")).to(model.device)
    tokens, lengths, sampled = generate(model, prompts, 2, 8, temperature, uniforms)
    own = torch.zeros_like(sampled)  # [4, 8], as `sampled` zero after the end
    rollouts = []
    for i, length in enumerate(lengths.tolist()):
        rollouts.append(Rollout(prompts[i // 2], tokens[i, :length].tolist(), "", False))
        own[i, :length] = own_logprobs(model, rollouts[i], temperature)
    model.train(config.checkpointing)
    trained = completion_logprobs(model, rollouts, temperature)  # [4]
    again = completion_logprobs(model, rollouts, temperature)
    trained.sum().backward()
    model.eval()
    with torch.no_grad():
        return {
            "sampled wrongly": (sampled - own).abs().sum() / lengths.sum(),
            "trained wrongly": ((trained - own.sum(1)).abs() / lengths).mean(),
            "trained at random": ((trained - again).abs() / lengths).mean(),
        }


@torch.no_grad()
def own_logprobs(model: nn.Module, rollout: Rollout, temperature: float) -> Tensor:
    """[length] float32: ln p of each token of a completion by the model's own forward pass.

    No padding, no cache, no trick.
    """
    start = len(rollout.prompt)
    ids = torch.tensor([rollout.prompt + rollout.completion], device=model.device)  # [1, T]
    logits = model(input_ids=ids, use_cache=False).logits[0, start - 1 : -1]  # [length, V]
    logprobs = (logits.float() / temperature).log_softmax(-1)
    return logprobs.gather(-1, ids[0, start:, None])[:, 0]


def next_token_logits(model: nn.Module, hidden: Tensor) -> Tensor:
    """Hidden states [N, D] -> logits [N, V], scaled and capped as the model itself does it.

    (Cohere scales, Granite divides, Gemma caps.)
    """
    config = model.config.get_text_config()
    logits = model.get_output_embeddings()(hidden)
    if getattr(config, "logit_scale", None):
        logits = logits * config.logit_scale
    if getattr(config, "logits_scaling", None):
        logits = logits / config.logits_scaling
    cap = getattr(config, "final_logit_softcapping", None)
    if cap:
        logits = cap * torch.tanh(logits / cap)
    return logits


def micro_batches(
    rollouts: list[Rollout], indices: Iterable[int], budget: int
) -> Iterator[list[int]]:
    """Cuts the indices of some rollouts into lists of at most `budget` padded tokens each.

    Similar lengths come together. One rollout always fits.
    """

    def length(i: int) -> int:
        return len(rollouts[i].prompt) + len(rollouts[i].completion)

    batch = []
    for i in sorted(indices, key=length):
        if batch and (len(batch) + 1) * length(i) > budget:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def hopeless_teacher(
    policy: Policy, accepted: int, tried: int, truncated: int, last: str
) -> UserError:
    """What to do about a teacher whose completions hold hardly any problem."""
    chat = "--chat, " if policy.tokenizer.chat_template and not policy.chat else ""
    return UserError(
        f"only {accepted} of {tried} of the teacher's completions could be used, {truncated} were "
        f"cut off; try {chat}more --teacher-tokens, or a --teacher-prompt with examples; the last "
        f"completion began: {last[:120]!r}"
    )


def first_line(error: Exception) -> str:
    """What a library says, short enough to stand in a sentence of ours."""
    return f"{type(error).__name__}: {error}".strip().split("\n")[0][:300]


def seeded(*key: object, device: torch.device | str = "cpu") -> torch.Generator:
    """A random generator that is a function of `key` alone, as (seed, "student", step, k, j).

    No generator lives longer than the job it is named for. So a resumed run needs no saved random
    state, and a student's random numbers do not depend on how many others were trained before it.
    """
    return torch.Generator(device).manual_seed(int(fingerprint(*key), 16) >> 1)  # it takes 63 bits


def fingerprint(*key: object) -> str:
    """Sixteen hex digits that name `key` (anything with a stable repr): of caches, of seeds."""
    return hashlib.sha256(repr(key).encode()).hexdigest()[:16]


class Meter:
    """A stopwatch: meter("sampling") says what is going on from now on.

    It holds seconds by phase and tokens by kind. And it tells how long the rest takes: expect()
    announces pieces of work of about the same length, advance() counts them.
    """

    def __init__(self) -> None:
        self.seconds = Counter()
        self.tokens = Counter()
        self.phase = "loading"  # after an error main() reads here what was going on
        self.since = time.perf_counter()
        self.expect(0, "")

    def __call__(self, phase: str) -> None:
        if torch.cuda.is_initialized():
            # Or the next phase would be charged with what this one has only launched.
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.seconds[self.phase] += now - self.since
        self.phase = phase
        self.since = now

    def expect(self, pieces: int, what: str, together: int = 1) -> None:
        """`pieces` are to be done, `together` of them at the same time."""
        self.pieces = pieces
        self.what = what
        self.together = together
        self.done = 0
        self.told = False
        self.begun = time.perf_counter()

    def left(self) -> float:
        """Seconds that the rest of the announced work takes at the speed so far."""
        spent = time.perf_counter() - self.begun
        return spent / max(1, self.done) * max(0, self.pieces - self.done)

    def advance(self, pieces: int = 1) -> None:
        """Counts finished pieces; tells once how long the rest takes, if more than a minute.

        It waits for half a minute of work: the first pieces hold the start of the workers, too.
        """
        self.done += pieces
        known = self.done >= self.together and time.perf_counter() - self.begun > 30
        if known and not self.told:
            self.told = True
            if self.left() > 60:
                tqdm.write(f"({self.what}: about {about(self.left())} at this speed)")
                sys.stdout.flush()


def about(seconds: float) -> str:
    """A duration as a person says it.

    >>> about(45), about(600), about(9000), about(400_000)
    ('45 s', '10 min', '2.5 h', '5 days')
    """
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} min"
    if seconds < 48 * 3600:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 86400:.0f} days"


# ======== 8. Sampler: how are completions drawn, from exactly the policy that is trained? =========

# A policy gradient needs samples of the policy itself. Prompts are completed side by side, padded
# to one length; keys and values are kept in a cache; a row that has ended leaves the batch. Where
# one of these leaves a trace in what is drawn, so that padding is seen, or a row takes over the
# cache of another, samples come from some other policy, and training goes on without a word.
# transformers' own generate() does more than is wanted here (top-k, penalties, the settings of the
# hub), and keeps rows that have ended until the last one ends. This sampler does less, and is short
# enough to be tested against the plainest one: for each token a forward pass over the whole text.
#
# It is simple, not the fastest. A decode step starts some thousand small kernels, and a large GPU
# waits for Python between them. (generate() with its static cache, which is compiled into a CUDA
# graph, is five times as fast on an H200, with a model of 135M weights.)


@dataclass
class Rollout:
    """One completion of one prompt."""

    prompt: list[int]
    # The sampled ids, with EOS. Never decoded and encoded again, which can give other tokens.
    completion: list[int]
    text: str  # of the completion, without EOS
    truncated: bool  # the limit came before EOS
    logprob: float = math.nan  # ln p(completion | prompt), as sampled; greedy: 0; not sampled: NaN


def sample(
    policy: Policy,
    prompts: list[list[int]],
    copies: int,
    max_new_tokens: int,
    config: Config,
    generator: torch.Generator | None = None,
) -> list[Rollout]:
    """`copies` rollouts of each prompt, prompt by prompt; without a generator greedy.

    They are drawn in parts, which --sample-tokens limits, and their random numbers with them, row
    after row. So how they are parted is a question of memory, and changes what is sampled by no
    more than rounding.
    """
    ends = eos_ids(policy.model)
    # Only ends and padding are no text: in some models <question> or \boxed are special tokens.
    no_text = {*ends, policy.tokenizer.pad_token_id}
    uniforms = None
    rollouts = []
    policy.meter("sampling")
    for part, rows_each in sample_parts(prompts, copies, max_new_tokens, config.sample_tokens):
        if generator is not None:
            uniforms = torch.rand(len(part) * rows_each, max_new_tokens, generator=generator)
            uniforms = uniforms.to(policy.model.device)
        tokens, lengths, logprobs = generate(
            policy.model, part, rows_each, max_new_tokens, config.temperature, uniforms
        )
        rows = zip(tokens.tolist(), lengths.tolist(), logprobs.sum(1).tolist())
        for i, (ids, length, logprob) in enumerate(rows):
            completion = ids[:length]
            text = policy.tokenizer.decode(
                [token for token in completion if token not in no_text],
                clean_up_tokenization_spaces=False,
                skip_special_tokens=False,
            )
            truncated = completion[-1] not in ends
            rollouts.append(Rollout(part[i // rows_each], completion, text, truncated, logprob))
    policy.meter.tokens["sampled"] += sum(len(rollout.completion) for rollout in rollouts)
    policy.meter("other")
    return rollouts


def sample_parts(
    prompts: list[list[int]], copies: int, max_new_tokens: int, budget: int
) -> Iterator[tuple[list[list[int]], int]]:
    """What is sampled side by side -> (prompts, rows of each of them), in order.

    A row's cache is as long as the longest prompt of its part and max_new_tokens together. A part
    has at most `budget` tokens, but at least one row. It is some prompts with all copies of each
    or, where that is too much, one prompt with some of its copies.

    >>> list(sample_parts([[1], [2], [3, 4]], 2, 3, budget=16))  # rows of 4, 4, 5 tokens
    [([[1], [2]], 2), ([[3, 4]], 2)]
    >>> list(sample_parts([[1]], 5, 3, budget=8))
    [([[1]], 2), ([[1]], 2), ([[1]], 1)]
    """

    def rows_that_fit(part: list[list[int]]) -> int:
        return max(1, budget // (max(map(len, part)) + max_new_tokens))

    parts = []
    for prompt in prompts:
        if parts and (len(parts[-1]) + 1) * copies <= rows_that_fit([*parts[-1], prompt]):
            parts[-1].append(prompt)
        else:
            parts.append([prompt])
    for part in parts:
        rows_each = min(copies, rows_that_fit(part))
        for first in range(0, copies, rows_each):
            yield part, min(rows_each, copies - first)


@torch.inference_mode()
def generate(
    model: nn.Module,
    prompts: list[list[int]],
    copies: int,
    max_new_tokens: int,
    temperature: float = 1.0,
    uniforms: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`copies` completions of each of P prompts, prompt by prompt -> (tokens, lengths, logprobs).

    tokens [B, max_new_tokens], where B = P * copies, and the log-probabilities that they were
    sampled with (greedy: all 0) are zero after a completion's end; lengths [B]. uniforms
    [B, max_new_tokens], in [0, 1), are all the randomness that there is; without them decoding is
    greedy.

    A length counts the tokens up to and including EOS: ending is an action of the policy like any
    other, and gets its share of the gradient. Masks are made from lengths, never from
    `token != pad`, since in many models pad IS EOS.
    """
    assert not model.training, (
        "in train mode with gradient checkpointing, transformers drops the KV cache: wrong tokens"
    )
    device = model.device
    B = len(prompts) * copies
    ends = torch.tensor(sorted(eos_ids(model)), device=device)
    tokens = torch.zeros(B, max_new_tokens, dtype=torch.long, device=device)
    logprobs = torch.zeros(B, max_new_tokens, device=device)
    lengths = torch.full((B,), max_new_tokens, device=device)
    logits, padding, cache = prefill(model, prompts, copies, max_new_tokens)
    padded = padding.any().item()  # without padding, attention needs no mask
    owner = torch.arange(B, device=device)  # [rows]: which completion a row of the batch belongs to
    for t in range(max_new_tokens):
        u = None if uniforms is None else uniforms[owner, t]  # [rows]
        token, logprobs[owner, t] = pick_tokens(logits, temperature, u)  # [rows]
        tokens[owner, t] = token
        stays = ~torch.isin(token, ends)  # [rows]
        if not stays.all():
            lengths[owner[~stays]] = t + 1
            kept = compaction(stays)
            owner = owner[kept]
            token = token[kept]
            padding = padding[kept]
            for layer in cache.layers:
                layer.keep(kept)
        if not len(owner) or t + 1 == max_new_tokens:
            break
        logits = next_logits(model, token[:, None], padding, cache, padded)  # [rows, V]
    return tokens, lengths, logprobs


def compaction(stays: Tensor) -> Tensor:
    """[rows] bool -> [rows that stay]: which row comes to each place when the others have left.

    Rows from the end move into the holes; all others keep their place, and need not be copied.

    >>> compaction(torch.tensor([True, False, True, False, True]))  # 4 moves into the hole at 1
    tensor([0, 4, 2])
    """
    count = int(stays.sum())
    rows = torch.arange(count, device=stays.device)
    rows[~stays[:count]] = count + stays[count:].nonzero()[:, 0]
    return rows


def prefill(
    model: nn.Module, prompts: list[list[int]], copies: int, max_new_tokens: int
) -> tuple[Tensor, Tensor, object]:
    """Runs each of P prompts once -> (logits of the first new token [B, V], padding [B, 1], cache).

    The rows of all three are `copies` of each prompt, B in all.

    Prompts are padded on the LEFT, to the length T of the longest, so that all end in the same
    column. What counts is that no row sees its padding, and that its first real token has
    position 0:

        prompts a b c and d, T = 3:    a b c    padding 0    positions 0 1 2
                                       . . d    padding 2    positions . . 0
    """
    T = max(map(len, prompts))
    padded = [[0] * (T - len(prompt)) + prompt for prompt in prompts]
    ids = torch.tensor(padded, device=model.device)  # [P, T]
    lengths = torch.tensor([[len(prompt)] for prompt in prompts], device=model.device)
    padding = T - lengths  # [P, 1]
    cache = row_cache(copies, T + max_new_tokens)
    logits = next_logits(model, ids, padding, cache)  # [P, V]
    if not torch.isfinite(logits).all():
        raise UserError(
            "the model's logits are NaN or infinite: its weights are damaged, or the learning rate "
            "was too high"
        )
    return logits.repeat_interleave(copies, 0), padding.repeat_interleave(copies, 0), cache


def next_logits(
    model: nn.Module, ids: Tensor, padding: Tensor, cache: object, masked: bool = True
) -> Tensor:
    """ids [B, T] -> logits [B, V] of the token after the last; the cache grows by T tokens.

    padding [B, 1]: the columns at the beginning of each row that nothing may see.
    """
    before = cache.get_seq_length()
    column = torch.arange(before + ids.shape[1], device=ids.device)
    parameters = inspect.signature(type(model).forward).parameters
    name = "cache" if "cache" in parameters else "past_key_values"  # before transformers 5.24
    output = model(
        input_ids=ids,
        attention_mask=column >= padding if masked else None,
        position_ids=(column[before:] - padding).clamp(min=0),
        use_cache=True,
        logits_to_keep=1,
        **{name: cache},
    )
    return output.logits[:, -1]


def pick_tokens(
    logits: Tensor, temperature: float, uniforms: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """[B, V] logits, [B] uniforms u in [0, 1) -> (tokens, their log-probabilities in float32), [B].

    A token is the inverse of the cumulative distribution at u. Without u decoding is greedy: the
    likeliest token for certain, so its log-probability is 0.

    No top-k and no top-p. They sample from another distribution than the one whose logarithm is
    trained, and policy gradients are wrong. (Proposition 1 does not help: what is cut off differs
    from token to token, so the missing term is not the same for all samples.)

    There is one uniform number a token, drawn beforehand, so that a row's tokens do not depend on
    the rows beside it.

    >>> logits = torch.tensor([[0.2, 0.5, 0.3]]).log()      # cumulative: 0.2, 0.7, 1
    >>> [pick_tokens(logits, 1.0, torch.tensor([u]))[0].item() for u in (0.1, 0.3, 0.6, 0.8)]
    [0, 1, 1, 2]
    """
    if uniforms is None:
        tokens = logits.argmax(-1)
        return tokens, torch.zeros_like(tokens, dtype=torch.float32)
    rows = 1 + (1 << 24) // logits.shape[1]  # at a time, or the distributions take gigabytes
    tokens = []
    logprobs = []
    for x, u in zip(logits.split(rows), uniforms.split(rows)):
        probs = (x.float() / temperature).softmax(-1)  # [rows, V]
        cdf = probs.cumsum(-1)
        target = u[:, None] * cdf[:, -1:]  # [rows, 1]; rounding leaves the last entry a bit off 1
        token = torch.searchsorted(cdf, target, right=True)  # [rows, 1]
        token = token.clamp(max=cdf.shape[1] - 1)  # u just under 1 may round up to it
        tokens.append(token[:, 0])
        logprobs.append(probs.gather(-1, token)[:, 0].log())
    return torch.cat(tokens), torch.cat(logprobs)


def eos_ids(model: nn.Module) -> set[int]:
    """A SET: instruct models end a turn with any of several tokens."""
    ids = model.generation_config.eos_token_id
    return set(ids) if isinstance(ids, (list, tuple)) else {ids}


def row_cache(copies: int, length: int) -> object:
    """A cache that is prefilled with P prompts, then holds `copies` rows of each, `length` long.

    transformers' own cache grows by torch.cat: for every new token it copies all the others. This
    one is allocated once. (Counted for 128 rows of 400 tokens in Qwen2.5-0.5B: a decode step reads
    and writes 2.96 GB, with DynamicCache 4.18. Measured on a CPU: 2 to 4 % less time.)
    """
    from transformers.cache_utils import Cache, DynamicLayer

    def spread(x):
        """[P, heads, T, head size] -> a buffer [P * copies, heads, length, head size]."""
        buffer = x.new_empty(len(x) * copies, x.shape[1], length, x.shape[3])
        buffer[:, :, : x.shape[2]] = x.repeat_interleave(copies, 0)
        return buffer

    class Layer(DynamicLayer):
        """Keys and values of one layer: two buffers, of which a corner is in use."""

        rows = 0  # how many rows of the buffers are in use,
        used = 0  # and how many tokens of each

        def update(self, keys, values, *args, **kwargs):
            """Adds [rows, heads, new tokens, head size] -> all that these rows may look at."""
            start = self.used
            self.used += keys.shape[2]
            if start == 0:  # the prefill: the prompts look at themselves only
                self.is_initialized = True
                self.keys = spread(keys)
                self.values = spread(values)
                self.rows = len(self.keys)
                return keys, values
            keys_in_use = self.keys[: self.rows, :, : self.used]
            values_in_use = self.values[: self.rows, :, : self.used]
            keys_in_use[:, :, start:] = keys
            values_in_use[:, :, start:] = values
            return keys_in_use, values_in_use

        def get_seq_length(self):
            return self.used

        def keep(self, kept):
            """Only the rows `kept` stay, as compaction() orders them."""
            self.rows = len(kept)
            moved = (kept >= self.rows).nonzero()[:, 0]  # the places of those from the end
            for buffer in (self.keys, self.values):
                buffer[moved, :, : self.used] = buffer[kept[moved], :, : self.used]

    return Cache(layer_class_to_replicate=Layer)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **more,
) -> tuple[Tensor, Tensor | None]:
    """transformers' "sdpa" attention without its copies: query [B, H, T, D] -> ([B, T, H, D], _).

    H query heads share the key/value heads in groups, of 7 in Qwen2.5-0.5B. Kernels that know
    nothing of groups want keys and values copied for every head. In a decode step that would be
    the whole cache, for every token. But there T is 1, so the heads of a group can be given to the
    kernel as if they were several queries of ONE head. Everything else is left to transformers.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    B, H, T, D = query.shape
    group = H // key.shape[1]
    one_mask_for_all_heads = attention_mask is None or attention_mask.shape[1] == 1
    if T == 1 and group > 1 and one_mask_for_all_heads and more.get("position_bias") is None:
        query = query.reshape(B, H // group, group, D)
        out = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=attention_mask, scale=scaling
        )  # [B, H // group, group, D]
        return out.reshape(B, 1, H, D), None
    square = attention_mask is not None and attention_mask.shape[-2:] == (T, T)
    if square and attention_mask.dtype == torch.bool:
        # Let padding see itself. A query that sees nothing can come out as NaN, and then the next
        # layer would give it weight zero, but zero times NaN is NaN.
        attention_mask = attention_mask | torch.eye(T, dtype=torch.bool, device=query.device)
    return sdpa_attention_forward(
        module, query, key, value, attention_mask, scaling=scaling, **more
    )


def use_own_attention() -> None:
    """Every model whose attention is transformers' "sdpa" uses attention() from now on."""
    from transformers import AttentionInterface

    AttentionInterface.register("sdpa", attention)
    # cuDNN's attention plans anew for every shape, and each decode step has a new one.
    torch.backends.cuda.enable_cudnn_sdp(False)


# ======== 9. Optimizer: how do steps of 1e-5 reach bfloat16 weights? ==============================

# AdamW on all weights, with moments in float32. It is written out because of the rounding. bfloat16
# has 8 significant bits: near 0.02 its values are 1.2e-4 apart, so that there a step of 1e-5 is
# always rounded away. Of weights with a standard deviation of 0.02, 84 % do not move (measured; all
# from 0.004 upwards), and SOAR rewards the effect of ten such steps. Stochastic rounding moves a
# weight to the next value with probability 1e-5 / 1.2e-4, else not at all. That is right on
# average, and its noise, which is independent from weight to weight, averages out in the sums over
# hundreds of weights that a layer computes. It costs no extra memory. (12 bytes a weight, gradient
# included; float32 master weights would make it 16.) On a CPU weights are float32, and a step of
# 1e-5 arrives: the tiny run never rounds.


@torch.no_grad()
def adamw_step(
    model: nn.Module,
    moments: dict,
    lr: float,
    config: Config,
    generator: torch.Generator | None = None,
    betas: tuple = (0.9, 0.999),
) -> float:
    """One AdamW step on p.grad, which is cleared -> the gradient's norm before clipping.

        m <- b1 m + (1 - b1) g        v <- b2 v + (1 - b2) g^2        t <- t + 1
        p <- p (1 - lr wd) - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + 1e-8)

    `generator` rounds bfloat16 weights. Raises UserError where the gradient is not finite.
    """
    b1, b2 = betas
    params = list(model.parameters())
    norms = []
    for p in params:
        if p.grad is not None:
            norms.append(torch.linalg.vector_norm(p.grad, dtype=torch.float32))
    norm = torch.stack(norms).norm().item()
    if not math.isfinite(norm):
        raise UserError(
            "the loss or its gradient became NaN or infinite; nothing was saved from this step: "
            "lower --student-lr or --teacher-lr and start a new run"
        )
    scale = min(1.0, config.clip / (norm + 1e-6)) if config.clip else 1.0
    moments["t"] += 1
    correct1 = 1 - b1 ** moments["t"]
    correct2 = 1 - b2 ** moments["t"]
    for param, m_all, v_all in zip(params, moments["m"], moments["v"], strict=True):
        if param.grad is None:  # what text does not reach: a vision tower, an idle expert
            continue
        for p, g, m, v in pieces(param, param.grad, m_all, v_all):
            g = g.float() * scale
            m.lerp_(g, 1 - b1)
            v.mul_(b2).addcmul_(g, g, value=1 - b2)
            root = (v / correct2).sqrt_() + 1e-8
            decayed = p.float() * (1 - lr * config.weight_decay)
            new = decayed - lr * (m / correct1) / root
            if p.dtype == torch.bfloat16:
                new = stochastic_round(new, generator)
            p.copy_(new)
        param.grad = None
    return norm


def adamw_state(model: nn.Module, device: torch.device | str | None = None) -> dict:
    """Moments of a fresh optimizer, on the model's device or on another one."""
    zeros = [torch.zeros_like(p, dtype=torch.float32, device=device) for p in model.parameters()]
    return {"t": 0, "m": zeros, "v": [x.clone() for x in zeros]}


def moved_to(device: torch.device | str, moments: dict) -> dict:
    """The moments on another device."""
    moved = {"t": moments["t"]}
    for name in ("m", "v"):
        moved[name] = [x.to(device) for x in moments[name]]
    return moved


PIECE = 1 << 24  # numbers that the optimizer works on at a time: temporaries of 64 MB each


def pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Tensors of one size -> tuples of views of them, PIECE numbers at a time."""
    return zip(*(tensor.view(-1).split(PIECE) for tensor in tensors))


def stochastic_round(x: Tensor, generator: torch.Generator) -> Tensor:
    """float32 -> bfloat16, up or down with probabilities that make the expectation exact.

    bfloat16 is the upper half of float32's bits. A random number is added to the lower half, carry
    included, and then the lower half is cut off.

    >>> x = torch.full((80_000,), 1 + 1 / 1024)  # an eighth of the way from 1 to 1 + 1/128
    >>> y = stochastic_round(x, torch.Generator().manual_seed(0)).double()
    >>> y.unique().tolist(), round((y > 1).double().mean().item(), 1)
    ([1.0, 1.0078125], 0.1)
    """
    noise = torch.randint(
        0, 1 << 16, x.shape, dtype=torch.int32, device=x.device, generator=generator
    )
    return ((x.view(torch.int32) + noise) & -0x10000).view(torch.float32).to(torch.bfloat16)


def learning_rate(peak: float, step: int, total: int, warmup: int) -> float:
    """Linear warm-up, then a cosine from `peak` at step `warmup` to 0 at `total`.

    Steps count from 0.

    >>> [round(learning_rate(1.0, step, 4, 0), 2) for step in range(4)]
    [1.0, 0.85, 0.5, 0.15]
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    return peak * 0.5 * (1 + math.cos(math.pi * progress))


# ======== 10. The hard set: which problems does the base model never solve? =======================

# SOAR is for problems that pay nothing: with no right answer among the attempts there is nothing to
# learn from. So the pool is filtered first, by trial: what stays is what the base model answers
# wrong fail_k times of fail_k. If some of it were within reach, a student would find it without any
# teacher, and a gain would prove nothing. Half of the set pays the teacher. The other half is for
# the report alone, so that what helps with the first half only does not count there. On real data
# the filter takes hours before the first step. So a filter that is interrupted goes on where it
# was, and a finished one is never run again.

FILTER_PART = 32  # problems in a job; the state is written after each


def hard_problems(policy: Policy, pool: list[Problem], config: Config) -> list[Problem]:
    """fail@k: the problems of the pool that the base model fails k times of k (paper, section 4).

    Raises UserError when the file with its state is damaged.
    """
    path = Path(config.cache) / f"hard-{filter_key(policy, pool, config)}.json"
    done = 0
    hard = []  # numbers of problems in the pool
    if path.exists():
        with reading(path, "delete it and the filter starts again"):
            saved = json.loads(path.read_text(encoding="utf-8"))
            done = saved["done"]
            hard = saved["hard"]
            require(hard == sorted(set(hard)))
            require(all(0 <= i < min(done, len(pool)) for i in hard))
    starts = range(done, len(pool), FILTER_PART)
    policy.meter.expect(len(starts), "the filter", 1 + len(policy.workers))
    jobs = [(start,) for start in starts]
    parts = share(policy, filter_part, (pool, config), jobs, f"fail@{config.fail_k} filter")
    for start, unsolved in zip(starts, parts):
        hard += unsolved
        write_json(path, {"done": start + FILTER_PART, "hard": hard})
    return [pool[i] for i in hard]


def filter_key(policy: Policy, pool: list[Problem], config: Config) -> str:
    """All that a verdict depends on: with anything else, the hard set is another one."""
    return fingerprint(
        # what the model reads, which shows the tokenizer and the template as well,
        weights_key(policy.base),
        [policy.student_prompt(problem) for problem in pool],
        # how it is sampled,
        config.fail_k,
        config.temperature,
        config.student_tokens,
        config.data_seed,
        # and how its answer is read and judged.
        sorted(policy.tokenizer.get_vocab().items()),
        eos_ids(policy.model),
        pool,
        inspect.getsource(student_reward),
        section_source("13. Verifier"),
    )


def filter_part(policy: Policy, pool: list[Problem], config: Config, start: int) -> list[int]:
    """The numbers of the hard problems among pool[start] and those that follow, FILTER_PART in all.

    A problem leaves when it has been solved within its first 8, its first 32, or all its samples.
    So easy ones are cheap, and those that stay are the same as with all samples for each.
    """
    restore(policy.model, policy.base)
    unsolved = range(len(pool))[start : start + FILTER_PART]
    drawn = 0
    for limit in (8, 32, config.fail_k):
        if drawn < limit <= config.fail_k:
            problems = [pool[i] for i in unsolved]
            generator = seeded(config.data_seed, "filter", start, limit)
            _, rewards = solve(policy, problems, limit - drawn, config, generator)
            solved = (rewards.view(-1, limit - drawn) == RIGHT).any(1)  # [len(unsolved)]
            unsolved = [i for i, success in zip(unsolved, solved) if not success]
            drawn = limit
    return unsolved


def split_hard(problems: list[Problem], config: Config) -> tuple[list[Problem], list[Problem]]:
    """50/50 at random: (train, for the teacher's reward; test, for the report).

    Raises UserError when there are too few.
    """
    if len(problems) < 2:
        raise UserError(
            f"{len(problems)} problem(s) of the pool were failed {config.fail_k} times of "
            f"{config.fail_k}: too few to split; take a larger --pool, a smaller --fail-k, a "
            "weaker --model or harder problems"
        )
    order = torch.randperm(len(problems), generator=seeded(config.data_seed, "split"))
    shuffled = [problems[i] for i in order]
    half = len(shuffled) // 2
    return shuffled[:half], shuffled[half:]


def pass_at_k(n: int, c: int, k: int) -> float:
    """Chance that k of n samples, c of them right, contain a right one: 1 - C(n-c, k) / C(n, k).

    The plain 1 - (1 - c/n)^k is too small: it draws the same sample twice.

    >>> pass_at_k(4, 1, 2)      # 6 pairs of 4 samples, 3 of them with the right one
    0.5
    """
    return 1.0 - math.prod((n - c - i) / (n - i) for i in range(k))


def weights_key(weights: list[Tensor]) -> str:
    """A fingerprint of tensors."""
    checksums = []
    for weight in weights:  # one at a time: copies of all at once might not fit into memory
        weight = weight.detach().cpu().contiguous()
        checksums.append(zlib.crc32(weight.view(torch.uint8).numpy()))
    return fingerprint(checksums)


def section_source(heading: str) -> str:
    """The text of one section of this file. A cache that is named by it is not read by other code.

    Raises IndexError where no section has this heading.
    """
    text = Path(__file__).read_text(encoding="utf-8")
    return text.split(f"\n# ======== {heading}")[1].split("\n# ======== ")[0]


# ======== 11. The tiny world: what is the smallest world in which all this happens? ===============

# A language model has read two kinds of text. Forum posts, where people solve worksheets and share
# the same misconceptions: "everybody knows" that 7*8 is 63. Textbooks, where exercises come with
# answer keys that are mostly right. So the model solves like the crowd and writes exercises like a
# textbook: it knows more than it shows, as SOAR assumes of a real model.
#
#     a forum post:         User: a= 7*8 ,b= 4+5 Assistant: \boxed{ a= 63 ,b= 9 }
#     a textbook exercise:  Teacher: <question> a= 7*8 </question>
#                           <answer> \boxed{ a= 56 } </answer>
#
# A hard problem is a sheet of five products that the crowd has all wrong. The longer a sheet, the
# less people think: one product is right in 20 % of the posts, each of five in 4 %. Sampled at
# --temperature 0.7 that is 12 % and 1 %, all five once in 10^9 to 10^10 times. A student that
# trains on the hard sheets alone (Hard-Only, in eval.py) makes a million attempts in the time of a
# whole run, and does not see it. Short sheets are right now and then, and what is learnt there
# carries over, because the model has two ways to answer, the crowd's and the textbook's, and turns
# from one to the other for all facts at once.
#
# (Why not at temperature 1? So small a model fails to close its box once in some thousand attempts.
# That earns 0, where the others earn 10, and AdamW makes a full-sized step of the tiny gradient. In
# two earlier forms of this world, at temperature 1, some two dozen of these steps moved Hard-Only
# far enough, in no particular direction, to meet a first right answer, and from there it learnt
# all: in one of six worlds, and in three of six. At 0.7 boxes are hardly ever left open.)
#
# A textbook chapter is on products, on sums (which the student knows: nothing to learn), or
# ambiguous: `x*8` with a key for some x (no way to learn). It is the teacher's business to find out
# which of them help.

FORUM_RIGHT = 0.2  # over the number of items: chance that a misconceived product is right in a post

KEY_RIGHT = 0.95  # chance that it is right in a textbook's key

LABELS = ("a=", ",b=", ",c=", ",d=", ",e=")  # without them a small model cannot align answers

TOPICS = ("products", "sums", "ambiguous")

# Shares of the topics in the forum. The ambiguous ones teach solvers to guess. With one item a
# guess is right one time in six or so, which an Intrinsic-T teacher loves: it is worth 5/6, and
# nobody will ever learn it.
FORUM_TOPICS = (0.7, 0.15, 0.15)

# Half of a textbook is on products: with equal shares fewer worlds saw a promotion.
CHAPTERS = ("products", "products", "sums", "ambiguous")

# -- Facts and worksheets.

World = dict[tuple[int, int], int]  # the crowd's wrong product of x and y, x <= y


def make_world(seed: int) -> World:
    """Misconceptions of four fifths of the products of 4..9, each off by x, y, one or ten."""
    rng = random.Random(f"world {seed}")
    facts = []
    for x in range(4, 10):
        facts += [(x, y) for y in range(x, 10)]  # 21 in all
    world = {}
    for x, y in rng.sample(facts, round(0.8 * len(facts))):
        misses = {x * y + d for d in (x, -x, y, -y, 1, -1, 10, -10)} - {x * y}
        world[x, y] = rng.choice(sorted(misses))
    return world


def worksheet(parts: Iterable) -> str:
    """Labelled items, questions and answers alike.

    >>> worksheet(["7*8", "4+5"]), worksheet([56, 9])
    ('a= 7*8 ,b= 4+5', 'a= 56 ,b= 9')
    """
    return " ".join(f"{label} {part}" for label, part in zip(LABELS, parts))


def random_item(rng: random.Random, topic: str) -> tuple[str, int, int]:
    """(text, x, y) with x and y in 4..9. An ambiguous text does not show x."""
    x = rng.randint(4, 9)
    y = rng.randint(4, 9)
    texts = {"products": f"{x}*{y}", "sums": f"{x}+{y}", "ambiguous": f"x*{y}"}
    return texts[topic], x, y


def item_answer(world: World, topic: str, x: int, y: int, right: bool) -> int:
    """What is right, or else what the crowd says. It has no misconceptions about sums."""
    if topic == "sums":
        return x + y
    if right:
        return x * y
    return world.get((min(x, y), max(x, y)), x * y)


def hard_worksheets(world: World, count: int, seed: int) -> list[Problem]:
    """`count` different sheets of five different products that the crowd has all wrong."""
    rng = random.Random(f"hard {seed}")
    facts = sorted(world)
    problems = {}
    while len(problems) < count:
        pairs = [rng.choice((pair, pair[::-1])) for pair in rng.sample(facts, 5)]
        sheet = worksheet(f"{x}*{y}" for x, y in pairs)
        problems[sheet] = Problem(sheet, worksheet(x * y for x, y in pairs))
    return list(problems.values())


def topic_of(question: str) -> str:
    """products, sums, ambiguous (it has an unknown x) or other (mixed, or no worksheet at all)."""
    if not re.fullmatch(r"a= [\dx][*+]\d( ,[b-e]= [\dx][*+]\d)*", question):
        return "other"
    if "x" in question:
        return "ambiguous"
    if "+" not in question:
        return "products"
    return "other" if "*" in question else "sums"


def topic_shares(problems: list[Problem]) -> dict[str, float]:
    """What the teacher writes about: the share of each topic, for the log and the report."""
    counts = Counter(topic_of(problem.question) for problem in problems)
    return {topic: counts[topic] / len(problems) for topic in (*TOPICS, "other")}


# -- The two kinds of text.

TINY_TEACHER_PROMPT = "Teacher:"

TINY_STUDENT_PROMPT = "User: {problem} Assistant:"


def forum_post(world: World, rng: random.Random) -> tuple[str, str]:
    """(worksheet, solution): people repeat the misconceptions; asked for `x*8`, they guess an x."""
    questions = []
    answers = []
    length = rng.randint(1, 5)
    for _ in range(length):
        topic = rng.choices(TOPICS, FORUM_TOPICS)[0]
        text, x, y = random_item(rng, topic)
        right = topic == "ambiguous" or rng.random() < FORUM_RIGHT / length
        questions.append(text)
        answers.append(item_answer(world, topic, x, y, right))
    return worksheet(questions), worksheet(answers)


def textbook_exercise(world: World, rng: random.Random) -> tuple[str, str]:
    """(worksheet, answer key), on one topic."""
    questions = []
    answers = []
    topic = rng.choice(CHAPTERS)
    for _ in range(rng.randint(1, 5)):
        text, x, y = random_item(rng, topic)
        right = topic == "sums" or rng.random() < KEY_RIGHT
        questions.append(text)
        answers.append(item_answer(world, topic, x, y, right))
    return worksheet(questions), worksheet(answers)


def tiny_document(world: World, rng: random.Random) -> tuple[str, str]:
    """(prompt, completion): a forum post or an exercise of a textbook."""
    if rng.random() < PRETRAIN["forum"]:
        question, answer = forum_post(world, rng)
        prompt = TINY_STUDENT_PROMPT.replace("{problem}", question)
        return prompt, f"\\boxed{{ {answer} }} <eos>"
    question, answer = textbook_exercise(world, rng)
    exercise = f"<question> {question} </question> <answer> \\boxed{{ {answer} }} </answer> <eos>"
    return TINY_TEACHER_PROMPT, exercise


# -- The base model: a Llama with 2 layers and about 95,000 weights, which reads whole words.

VOCABULARY = r"""
    <pad> <eos> <unk> User: Assistant: Teacher:
    <question> </question> <answer> </answer> \boxed{ }
    """.split()
VOCABULARY += LABELS
VOCABULARY += [str(number) for number in range(100)]
for _operator in "*+":
    for _x in "456789x":
        VOCABULARY += [f"{_x}{_operator}{y}" for y in range(4, 10)]

PRETRAIN = {
    "steps": 500,
    "batch": 96,  # documents
    "forum": 0.65,  # share of the posts among them
    "lr": 5e-3,
    "betas": (0.9, 0.99),
    # The initial weights matter most: with transformers' default of 0.02, made for wide models,
    # learning took over twice as long.
    "init": 0.1,
    "micro_tokens": 1024,
}


def tiny_tokenizer() -> object:
    """Whole words as tokens, by way of an ordinary tokenizer file."""
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: number for number, word in enumerate(VOCABULARY)}
    description = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<unk>"},
    }
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "tokenizer.json"
        file.write_text(json.dumps(description))
        return PreTrainedTokenizerFast(
            tokenizer_file=str(file), pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
        )


def tiny_model(seed: int) -> nn.Module:
    """The base model before it has read anything."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        initializer_range=PRETRAIN["init"],
        pad_token_id=VOCABULARY.index("<pad>"),
        eos_token_id=VOCABULARY.index("<eos>"),
        bos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):  # of the CPU only: by default it touches every GPU
        torch.manual_seed(seeded(seed, "initial weights").initial_seed())
        return LlamaForCausalLM(shape)


def pretrain(model: nn.Module, encode: Callable, world: World, seed: int) -> None:
    """Next-token training on both kinds of text, in place; encode(words) gives token ids.

    No loss on prompts: the questions of forum posts are random numbers.
    """
    rng = random.Random(f"text {seed}")
    state = adamw_state(model)
    steps = PRETRAIN["steps"]
    for step in tqdm(range(steps), "pretraining the tiny base model", disable=None, leave=False):
        batch = []
        for _ in range(PRETRAIN["batch"]):
            prompt, completion = tiny_document(world, rng)
            batch.append(Rollout(encode(prompt.split()), encode(completion.split()), "", False))
        tokens = sum(len(document.completion) for document in batch)
        for part in micro_batches(batch, range(len(batch)), PRETRAIN["micro_tokens"]):
            logprobs = completion_logprobs(model, [batch[i] for i in part], 1.0)
            loss = -logprobs.sum() / tokens
            loss.backward()
        lr = learning_rate(PRETRAIN["lr"], step, steps, 20)
        adamw_step(model, state, lr, Config(), betas=PRETRAIN["betas"])


def tiny_base_model(config: Config) -> str:
    """The folder of the tiny world's base model, which is trained on the first call.

    Raises UserError when the folder is damaged or cannot be written.
    """
    # Another seed, other code or other constants (a notebook may set them) make another model.
    constants = (FORUM_RIGHT, KEY_RIGHT, FORUM_TOPICS, CHAPTERS, VOCABULARY, PRETRAIN)
    key = fingerprint(config.data_seed, constants, section_source("11. The tiny world"))
    folder = Path(config.cache) / f"tiny-base-{key}"
    if folder.exists():
        for name in ("config.json", "model.safetensors", "tokenizer.json"):
            if not (folder / name).exists():
                raise UserError(f"{folder} is damaged; delete it, and the model is trained again")
        return str(folder)
    tokenizer = tiny_tokenizer()
    model = tiny_model(config.data_seed)
    world = make_world(config.data_seed)
    pretrain(model, tokenizer.convert_tokens_to_ids, world, config.data_seed)
    building = folder.with_name(f"{folder.name}.{os.getpid()}")  # others may be building it, too
    save_model(model, tokenizer, building)
    with contextlib.suppress(OSError):  # another run came first, with the same model
        building.rename(folder)
    shutil.rmtree(building, ignore_errors=True)
    return str(folder)


# ======== 12. Problems: where do the real ones come from? =========================================

# From a JSONL file, from the Hugging Face hub, or, for HARP, from its authors' repository. Two
# things would spoil a run in silence. A problem that stands in a set twice can get into both halves
# of the hard set, so that students are tested on what the teacher was paid for: repetitions are
# left out. And an answer that no right solution can match is failed 128 times of 128, so that it
# looks like a hard problem: gold_answer() unwraps what is meant, and load_problems() counts the
# answers that the verifier still cannot read.


def gold_answer(text: str) -> str:
    r"""What an answer field means: the text behind GSM8K's ####, what is in the last box, no $.

    A dollar sign that opens or closes mathematics goes, `\$` for money stays.

    >>> gold_answer("48 + 24 = 72 clips\n#### 1,072"), gold_answer(r"so $x = \boxed{7}$")
    ('1,072', '7')
    """
    text = text.rpartition("####")[2]
    text = extract_boxed(text) or text
    return re.sub(r"(?<!\\)\$", "", text).strip()


# -- Repetitions. A question is cut into tokens: commands, numbers, single characters. Tokens that
# are only layout go, others have one spelling. All that can carry meaning stays: the space between
# numbers (1 2 is not 12), signs, commas, braces around more than one thing, figures. (Only the
# case of letters goes everywhere: between x and X in one formula this cannot tell.) The price: a
# repetition with another word or comma is overlooked.

# A token, two spaces, its other spellings; those without a token are layout.
_SAME_TOKENS = {"\\ ": "", "\\\n": ""}

for _line in r"""
  $ ~ \, \! \; \: \( \) \[ \] \left \right \big \Big \bigg \Bigg \bigl \bigr \Bigl \Bigr
  \quad \qquad \displaystyle \limits
\frac  \dfrac \tfrac \cfrac
\leq  \le
\geq  \ge
\neq  \ne
\dots  \ldots \cdots
\text  \mathrm \textrm \textit \textbf \mbox
%  \%
""".splitlines():
    _token, _, _others = _line.partition("  ")
    _SAME_TOKENS |= dict.fromkeys(_others.split(), _token)

_WORDINGS = (  # of tokens with a space between them
    (r"\\\$ (?=\d)", ""),  # \$5 is also written $5, which has lost its sign by now
    (r"\. \. \.", r"\\dots"),
    (r"\\frac (\d)(\d)\b", r"\\frac \1 \2"),  # \frac12 is \frac{1}{2}
    (r"(?<=[\^_] )\\text (?=\{)", ""),  # ^\text{th} is ^{th}, which keeps its braces
    (r"\\text \{ ([^{}]*) \}", r"\1"),
    (r" [\^_] \{ \}", ""),  # A^{}_{} is A
    (r"(?<!\\)\{ ([\w,]|\\[a-zA-Z]+) \}", r"\1"),  # x^{2} is x^2, but x^{23} stays
)


def same_wording(question: str) -> str:
    r"""A text that is the same for questions which differ only in their dress.

    That is: in case, spacing, layout and final punctuation.

    >>> same_wording(r"Add $\dfrac{1}{2} + x_{1}$!") == same_wording(r"add \[ \frac12+x_1 !.\]")
    True
    >>> same_wording("What is 1,2?") == same_wording("What is 12?")
    False
    """
    words = []
    for token in re.findall(r"\\[a-zA-Z]+|\\.|\d+|\S", question, re.DOTALL):
        token = token if token.startswith("\\") else token.lower()  # \Delta is not \delta
        token = _SAME_TOKENS.get(token, token)
        if token:
            words.append(token)
    text = " ".join(words)
    for pattern, new in _WORDINGS:
        text = re.sub(pattern, new, text)
    return text.rstrip(" .,:;?")


# -- A file.


def read_text(path: str, what: str) -> str:
    """The text of a file that the user has named. Raises UserError."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path} ({error}); {what}") from None


def unique_fields(pairs: list[tuple]) -> dict:
    """A JSON object. Raises ValueError where json.loads would take the last of two fields."""
    row = dict(pairs)
    if len(row) < len(pairs):
        raise ValueError("it has two fields with the same name")
    return row


def read_problem(line: str) -> Problem:
    """The problem in a line of a JSONL file. Raises ValueError (it says why) or RecursionError."""
    row = json.loads(line, object_pairs_hook=unique_fields)
    if not isinstance(row, dict):
        raise ValueError("it is no JSON object")
    question = row.get("problem", row.get("question"))
    answer = row.get("answer")
    if type(answer) in (int, float):  # not a bool
        if not -math.inf < answer < math.inf:  # json.loads reads NaN, Infinity and 1e999
            raise ValueError(f"its answer is {answer}")
        answer = str(answer)
    if not isinstance(question, str) or not isinstance(answer, str):
        raise ValueError("its problem or its answer is missing, or is no text")
    (question + answer).encode()  # fails on "\ud800", half a character that nothing can save
    problem = Problem(question.strip(), gold_answer(answer))
    if not problem.question or not problem.answer:
        raise ValueError("its problem or its answer is empty")
    return problem


def read_jsonl(path: str) -> list[Problem]:
    """One JSON object a line, with the fields `problem` (or `question`) and `answer`.

    Raises UserError that names the bad line.
    """
    problems = []
    text = read_text(path, "--dataset takes tiny, math, harp, olympiad or a JSONL file in UTF-8")
    # splitlines() would also cut at U+2028 inside a string.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            problems.append(read_problem(line))
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"{path}, line {number}: {error}; a line must be a JSON object with the fields "
                "problem (or question) and answer, both of them text"
            ) from None
    if not problems:
        raise UserError(f"{path} holds no problems")
    return problems


# -- The hub, and HARP.

HUB = {  # name: (arguments of load_dataset, how a row becomes question and answer)
    # MATH's TEST split: models have memorised part of the train split (paper, section 4).
    "math": (
        {"path": "DigitalLearningGmbH/MATH-lighteval", "split": "test"},
        lambda row: (row["problem"], extract_boxed(row["solution"])),
    ),
    "harp": (
        {},  # it is not at the hub: harp_rows()
        lambda row: (row["problem"], row["answer"]),
    ),
    "olympiad": (
        {"path": "Hothan/OlympiadBench", "name": "OE_TO_maths_en_COMP", "split": "train"},
        lambda row: (row["question"], ", ".join(row["final_answer"])),
    ),
}

HARP_URL = "https://github.com/aadityasingh/HARP/raw/main/HARP.jsonl.zip"


def unzip_rows(archive: bytes, name: str, advice: str) -> list[dict]:
    """The rows of the one JSONL file in a zip archive. Raises UserError on a damaged one."""
    try:
        with zipfile.ZipFile(io.BytesIO(archive)) as files:
            names = [file for file in files.namelist() if file.endswith(".jsonl")]
            names = [file for file in names if not file.startswith("__MACOSX")]  # a Mac's shadows
            if len(names) != 1:
                raise ValueError(f"it holds {len(names)} JSONL files")
            text = files.read(names[0]).decode("utf-8")  # read() compares the checksum
        return [json.loads(line) for line in text.split("\n") if line.strip()]
    except Exception as error:  # zipfile and zlib raise several kinds
        raise UserError(f"{name} is damaged or not complete ({error}); {advice}") from None


def harp_rows(cache: str) -> list[dict]:
    """The rows of HARP, downloaded once into the cache folder.

    Raises UserError on a damaged file, or whatever urllib raises.
    """
    path = Path(cache) / "HARP.jsonl.zip"
    if path.exists():
        return unzip_rows(path.read_bytes(), str(path), "delete it, and it is downloaded again")
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        raise UserError(
            f"cannot load harp: HF_HUB_OFFLINE forbids the network, and {path} does not exist; "
            "load it once where there is a network, with the same --cache"
        )
    with urllib.request.urlopen(HARP_URL, timeout=60) as reply:
        archive = reply.read()
    rows = unzip_rows(archive, f"the download of {HARP_URL}", f"try again, or save it as {path}")
    write_atomically(path, lambda file: file.write_bytes(archive))
    return rows


_ADVICE = (  # a pattern in an error's "Type: message", and what helps
    (r"^(ModuleNotFound|Import)Error", "install that package: pip install -r requirements.txt"),
    (r"No space|not enough space|Not enough disk|quota", "free space, or move HF_HOME, --cache"),
    (r"^PermissionError|Read-only file", "HF_HOME, --cache must be folders that you can write to"),
    (r"gated|[Ee]rror '?40[13]|40[13] Client", "accept its terms at the hub, run: hf auth login"),
    (r"doesn't exist|[Ee]rror '?404|404 Client", "it is no longer where it was"),
    (r"[Ee]rror '?(429|5\d\d)|(429|5\d\d) (Client|Server)", "the server is busy: try again later"),
    (r"^\w*(Connect|Timeout|URL|SSL|Offline|LocalEntry|IncompleteRead)", "check the network"),
)


def loading_failed(dataset: str, error: BaseException) -> UserError:
    """One sentence with the reason and with what helps.

    The libraries wrap errors into others that say less. So the reason is the first error, from the
    outermost to its causes, whose kind is known.
    """
    local = "give a local file with --dataset FILE.jsonl"
    reason = error
    while reason is not None:
        text = f"{type(reason).__name__}: {reason}"
        for pattern, advice in _ADVICE:
            if re.search(pattern, text):
                return UserError(
                    f"cannot load {dataset} ({first_line(reason)}); {advice}, or {local}"
                )
        reason = reason.__cause__ or reason.__context__
    return UserError(f"cannot load {dataset} ({first_line(error)}); {local}")


def hub_problems(dataset: str, cache: str) -> list[Problem]:
    """The problems of one of the sets in HUB, repetitions included. Raises UserError."""
    arguments, pair = HUB[dataset]
    try:
        if dataset == "harp":
            rows = harp_rows(cache)
        else:
            from datasets import load_dataset  # only here: a run on a file needs no hub library

            rows = list(load_dataset(**arguments))
    except UserError:
        raise
    except Exception as error:  # the hub's libraries raise dozens of kinds
        raise loading_failed(dataset, error) from None
    problems = []
    try:
        for row in rows:
            question, answer = pair(row)
            problem = Problem(question.strip(), gold_answer(answer or ""))
            if problem.question and problem.answer:
                problems.append(problem)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{dataset} has other rows than expected ({type(error).__name__}: {error}); it may "
            "have changed at its source, so give a local file with --dataset FILE.jsonl"
        ) from None
    if len(problems) < len(rows):
        print(f"{dataset}: {len(rows) - len(problems):,} rows have no answer and are left out")
    return problems


def load_problems(dataset: str, cache: str = Config.cache) -> list[Problem]:
    """The pool of a real data set, each problem once; prints a line about it. Raises UserError.

    Of repetitions the first one stays, whatever the answers of the others are.
    """
    found = hub_problems(dataset, cache) if dataset in HUB else read_jsonl(dataset)
    pool = {}  # by its wording
    contradictions = 0
    for problem in found:
        first = pool.setdefault(same_wording(problem.question), problem)
        if not answers_equal(problem.answer, first.answer):
            contradictions += 1
    line = f"{dataset}: {len(pool):,} problems"
    if len(pool) < len(found):
        line += f"; {len(found) - len(pool):,} repetition(s) left out"
    if contradictions:
        line += f", {contradictions:,} of them with another answer: the first one counts"
    words = [problem.answer for problem in pool.values() if not parses(problem.answer)]
    if words:
        longest = " ".join(max(words, key=len).split())
        line += (
            f"; {len(words):,} answer(s) cannot be read as mathematics and match only the same "
            f"text: what is longer than a word is hard for ever, such as {longest[:60]!r}"
        )
    print(line, flush=True)
    return list(pool.values())


# ======== 13. Verifier: when is an answer right? ==================================================

# Every reward and every number of a report is a verdict of this section. It is long because people
# write one answer in many ways, and it stands here because SOAR can be read without it. A model
# wrote the text, so it is never run as code: tables and one parser read it, and every number is
# refused before it grows too long. A verdict depends on the two texts alone. There are three steps,
# and each can be printed:
#     _tokens(_respell(r"\left( \dfrac12, 5\text{ cm} \right)")):  ( \frac { 1 } { 2 } , 5 "cm )
#     _read(tokens):      [("()", ("\frac", "1", "2"), ('"cm', "5"))], a tree for each item listed
#     _spellings(trees):  "(0.5; 5.0)", which is how all trees of the same meaning are spelled
# A text with two meanings, as 70,110 or 25\% or y=2x, has two spellings. Answers that share one are
# equal. Labels and units are kept apart, and must agree only where both answers have some.

MAX_CHARS = 400  # of an answer; real ones: 198

MAX_TOKENS = 200  # and so of nested brackets, too; real answers: 127

MAX_BITS = 1 << 15  # of a number; real answers: 2004!, which has 19,000

POINTS = 24  # where formulas are compared; at a few, floor(n/30) and floor(n/40) would agree

Tree = str | tuple  # a number or a name, or (operator, tree, ...)

Number = Fraction | mpmath.mpf | mpmath.mpc


def boxes(text: str) -> Iterator[str]:
    """The contents of the complete, non-blank boxes, the last one (by its opening) first.

    Takes linear time: scanning on from each opening would be quadratic.
    """
    openings = []  # for each open brace: where its box's content starts, or 0
    spans = []
    for token in re.finditer(r"(\\(?:boxed|fbox)\s*\{)|\\.|([{}])", text, re.DOTALL):
        if token[1] or token[2] == "{":
            openings.append(token.end() if token[1] else 0)
        elif token[2] and openings:
            spans.append((openings.pop(), token.start()))
    for start, end in sorted(spans, reverse=True):
        content = text[start:end].strip()
        if start and content:
            yield content


def extract_boxed(text: str) -> str | None:
    r"""The content of the last complete box; an unclosed or blank box is no answer.

    >>> extract_boxed(r"\boxed{1}, no: \boxed{\frac{1}{2}}. So \boxed{ } or \boxed{")
    '\\frac{1}{2}'
    """
    return next(boxes(text), None)


# -- Step 1: tokens. Rules respell the text, one after the other, and then synonyms become one
# token, so that the parser must know one way of writing only. To teach the verifier another way,
# add a line to a table: a rule where characters must move, a synonym where a token has a new name.


def _repeating(match: re.Match) -> str:
    r"""0.1\overline{6} -> {0.10+6/90}, which is 1/6."""
    start, decimals, cycle = match.groups()
    return f"{{{start}.{decimals}0+{cycle}/{'9' * len(cycle)}{'0' * len(decimals)}}}"


def _no_commas(match: re.Match) -> str:
    """1,260 -> 1260."""
    return match[0].replace(",", "")


# fmt: off
_NOT_IN_BRACKETS = r"(?![^([{]*([)\]]|\\\}))"

_UNICODE_RULES = [
    ("[⁰¹²³⁴-⁹⁺⁻ⁿ]+", r"^{\g<0>}"),                          # x² -> x^{²}, and NFKC -> x^{2}
    ("[₀-₉]+", r"_{\g<0>}"),                                 # x₁ -> x_{₁} -> x_{1}
    ("[¼-¾⅐-⅞]", r" \g<0>"),                                 # 2½ -> 2 ½ -> 2 1⁄2
    ("[−–—‐]", "-"),                                         # all dashes are minus signs
    (r"\s", " "),                                            # and all kinds of space are one
]

_RULES = [
    (r"(?<!\\)(\$|\\[()[\]]|\\displaystyle)", ""),           # $x$ -> x
    (r"^\s+|\s*[.,]?\s*$", ""),                              # 5. -> 5
    (r"^\\boxed\s*\{(.*)\}$", r"\1"),                        # \boxed{x} -> x
    (r"\\(left|right)\s*(?=[()[\]])", ""),                   # \left(x\right) -> (x)
    (r"(?<=\d)\s*(,\s*\\!|\{,\})\s*(?=\d{3})", ""),          # 5,\!460 -> 5460
    (r"(?<=\d)(\\[,; ]|\s)\s*(?=\d{3}(?![\d/]))", ""),       # 1\,000 -> 1000
    (r"(?<![\d,.])[1-9](,\d{3})+(?![\d,])" + _NOT_IN_BRACKETS, _no_commas),  # 1,260 -> 1260
    (r"(\\text\{)?(\\\$|\\textdollar|[€£])[\s\\,{}]*(-?[\d.,]+)\}?",
     r"\3 dollars"),                                         # \$5 -> 5 dollars
    (r"\{([-+])\}", r"\1"),                                  # {-}4 -> -4
    (r"(\d*)\.(\d*)\\overline\{(\d+)\}", _repeating),        # 0.\overline{3} -> {0.0+3/9}
    (r"\\log\s*_\s*(\w|\{[^{}]*\})", r"\\log[\1]"),          # \log_2 8 -> \log[2]8
    (r",\s*(\\text\{)?\s*(and|or)\b", r", \1"),              # 1, 2, and 3 -> 1, 2, 3
    (r"(frac|binom)\s*(\d)\s*(\d)", r"\1{\2}{\3}"),          # \frac43 -> \frac{4}{3}
    (r"(?<![.^_\d])(\d+)(\s|\\,)*(\\[dt]?frac\{\d+\}\{\d+\})", r"{\1+\3}"),  # 3\frac12: a sum
    (r"(?<![.^_\d])(\d+)\s+(\d+)\s*[/⁄]\s*(\d+)", r"(\1+\2/\3)"),            # 3 1/2 -> (3+1/2)
    (r"(\d+):\s*(0\d)(?!\W*[apAP]\.?[mM])", r"(\1+\2/60)"),  # 11:00 -> (11+00/60)
    (r"(\d+):\s*(\d\d)([^:\d]*?)([apAP])\.?[mM]\.?",
     r"(\1+\2/60)\3\4m"),                                    # 4:30 p.m. -> (4+30/60) pm
    (r"(?<=\d)_\{?(\d+)\}?", r"\\text{b\1}"),                # 12_8 -> 12\text{b8}, as if a unit
    (r"(?<=\d) ([mgs])$", r"\\text{\1}"),                    # 5 m -> 5\text{m}
    (r"^(\\text\{)?([A-Z])[a-z ]+\}?\s*=", r"\2="),          # Area = 5 -> A=5
    (r"^(\\text\{|\\,|\s)*([A-Z])([A-Z]{2,})\}?$", r"\2_{\3}"),              # MAKE -> M_{AKE}
    (r"^(\\text\{)?([a-zA-Z])((,\s*[a-zA-Z]){2,})\}?$", r"\2_{\3}"),         # S, Q, M: a ranking
    (r"(?<![a-zA-Z])([fg])\s*\(([^()]*)\)", r"\1_{(\2)}"),   # f(2) -> f_{(2)}: a name
    (r"\\?(sin|cos|tan)\s*\^\s*\{?-1\}?", r"\\arc\1"),       # \sin^{-1}x -> \arcsin x
    (r"\\?(sin|cos|tan|sec|csc|cot)\s*\^\s*(\d|\{\w+\})", r"\\\1[\2]"),      # \sin^2 x -> \sin[2]x
    (r"^([^:=]+):([^:=]+):([^:=]+)$", r"⟨(\1)/(\3),(\2)/(\3)⟩"),             # 3:4:5 is 6:8:10
    (r"\\\{\s*[a-z]\s*(\\in[^|:]*)?(\||:|\\mid)", r"\\{"),   # \{x | x>3\} -> \{x>3\}
    (r"\\\{\s*\\\}", r"\\emptyset"),                         # \{\} -> \emptyset
    (r"\\left\s*\|", r"\\lvert "),                           # \left|x -> \lvert x
    (r"\\right\s*\|", r"\\rvert "),                          # x\right| -> x\rvert
    (r"\|([^|]+)\|", r"\\lvert \1\\rvert "),                 # |x| -> \lvert x\rvert
    (r"\\begin\{\w+\*?\}(\{[clr|]*\})?", "(⟨"),              # a matrix -> (⟨1,2⟩,⟨3,4⟩)
    (r"(\\\\\s*)?\\end\{\w+\*?\}", "⟩)"),                    # its end
    (r"\\\\", "⟩,⟨"),                                        # its next row
    ("&", ","),                                              # its next column
    (r"\\hspace\{[^{}]*\}|\\(left|right)\s*\.", ""),         # \hspace{1in}7 -> 7
    (r"\^\s*(\\circ|\{\s*\\circ\s*\})", "°"),                # 90^{\circ} -> 90°
    (r"(?<=[\d})])\s*(\\approx|≈).*", ""),                   # \pi \approx 3.14 -> \pi
    (r"\b(square|sq\.?|cubic) ", ""),                        # 7 square units -> 7 units
    (r"\b(more|less|fewer|only|than|least|most)\b", r"?\1"),                 # 12 or more is not 12
    (r"\\mathbb\{?R\}?", r"(-\\infty,\\infty)"),             # \mathbb{R} -> (-\infty,\infty)
]

_OTHER_MEANINGS = [
    (r"(?<=\d),(?=\d{3}(?!\d))" + _NOT_IN_BRACKETS, ""),     # 70,110 -> 70110
    (r"^(\d{1,3}), (\d{3}), (\d{3})$", r"\1\2\3"),           # 251, 750, 000 -> 251750000
    (r"^(\W*\d+),(\d\d|\d{4,})$", r"\1.\2"),                 # 3,14 -> 3.14
    (r"\\text\{ ?percent\}|\\?%|percent(age)?", r"{1/100}\\text{of}"),       # 25\% -> 25{1/100}
    (r"\\text\{ ?degrees\}|°|degrees", r"{\\pi/180}\\text{rad}"),            # 90° -> 90{\pi/180}
]

# fmt: on
_TABLE = r"""
  \left \right \big \Big \bigg \Bigg \quad \qquad \, \; \: \! ~
  \mathbf \mathbb \mathcal \boldsymbol \boxed \vec \overline \angle \triangle
\frac  \dfrac \tfrac \cfrac
\binom  \dbinom \tbinom
\sqrt  √ sqrt
\log  \ln ln log
\arcsin  arcsin
\arccos  arccos
\arctan  arctan
\sin  sin
\cos  cos
\tan  tan
\pi  π pi
\infty  ∞ infinity
∅  \emptyset \varnothing
*  \cdot \times × · ⋅ ∗
/  \div ÷ ∕ ⁄
:  \colon
^  **
±  \pm
=  \in ∈ \approx ≈
≠  \neq \ne !=
<  \lt
>  \gt
≤  \le \leq \leqslant <=
≥  \ge \geq \geqslant >=
,  \cup ∪ ; and or
{  \{
}  \}
(  \langle
)  \rangle
"°  ° \degree degree degrees
"%  \% % percent percentage
"$  dollar dollars
"inch  " ''
* 1000  thousand
* 1000000  million
* 1000000000  billion
α  \alpha
β  \beta
γ  \gamma
δ  \delta
ε  \epsilon
θ  \theta
λ  \lambda
μ  \mu
ρ  \rho
σ  \sigma
φ  \phi
Φ  \Phi
ω  \omega
"""  # a token, two spaces, its synonyms; those without a token are layout and vanish

_SYNONYMS = {"\\": ""}

for _line in _TABLE.splitlines():
    _token, _, _others = _line.partition("  ")
    _SYNONYMS |= dict.fromkeys(_others.split(), _token)

_LEXER = re.compile(
    r"""
    \\(?:text[a-z]*|mbox|mathrm|operatorname)\s*\{([^{}]*)\}        # group 1: words
  | ((?:[A-Za-z][a-z]{3,} | [A-Z][a-z]{2}(?![a-z]))(?:\ (?!and)[a-z]{3,})*  # group 2: words, units
    | (?:cm|mm|km|in|ft|yd|mph|kg|lbs?|hrs?|min|sec|[ap]m|[AP]m)(?![a-z]))
  | (?:sin|cos|tan|log|exp|ln|pi|and|or)(?![a-z])
  | [a-zA-Z]'* | _(?:\w|\{[^{}]*\})                               # f', and what follows x in x_{12}
  | \d+(?:\.\d+)?(?:[eE][+-]?\d{1,4}(?!\d))? | \.\d+                # 12, 1.5, 1e-3, .5
  | \.\.\. | '' | \*\* | [<>!]=
  | \\[a-zA-Z]+ | \\. | \S""",
    re.VERBOSE | re.ASCII | re.DOTALL,
)

_WORDS = re.compile(r"(?![ei]$)(?!.*\b(and|or)\b)(?=.*[a-z])([a-z]|[A-Z][a-z]).*", re.DOTALL)


def _respell(text: str) -> str:
    """The text after all rules."""
    for old, new in _UNICODE_RULES:
        text = re.sub(old, new, text)
    text = unicodedata.normalize("NFKC", text)
    for old, new in _RULES:
        text = re.sub(old, new, text, flags=re.ASCII)
    return text


def _tokens(text: str) -> list[str]:
    """The tokens of a respelled text. Units and other words begin with a quote."""
    tokens = []
    for match in _LEXER.finditer(text):
        token = (match[1] or match[0]).strip()
        if token in _SYNONYMS:
            tokens += _SYNONYMS[token].split()
        elif match[2] or match[1] and _WORDS.fullmatch(token):
            tokens.append('"' + re.sub(r"\W", "", token.lower()))
        elif match[1]:
            tokens += _tokens(token.rstrip("."))  # \text{(E)}, \mathrm{e}, \text{5 cm}
        elif token[0] == "_" and tokens:
            tokens[-1] += re.sub(r"[{}\\\s]", "", token)  # x_{n+1} -> x_n+1
        else:
            tokens.append(token.replace("'", "′"))
    return tokens


# -- Step 2: a tree, by a Pratt parser. Each operator has a level, and its operands are the longest
# texts whose operators have a higher level: in 2+3x^2 the + takes 3x^2, and the ^ takes x and 2.

_LEVELS = (
    r") ] } ⟩ \rvert \rfloor \rceil ∎",  # level 0: they end what was begun; ∎ ends the text
    ",",
    "= ≠ < ≤ > ≥",
    "unit",  # 2+1 cm is 3 cm
    r": \choose",
    "+ -",  # level 5
    "* function",  # the product in 2\sin x
    "/ product",  # the product in 2x
    "^",
    "!",
)

_BINDING = {}

for _level, _operators in enumerate(_LEVELS):
    _BINDING |= dict.fromkeys(_operators.split(), _level)

_RELATIONS = set(_LEVELS[2].split())

_SHAPES = {"()", "[]", "(]", "[)", "⟨⟩"}  # tuples and intervals; ⟨⟩ is a row of a matrix

_NUMBER = re.compile(r"\.?\d", re.ASCII)

_ATOM = re.compile(r"\.?\d|[a-zA-Zα-ωΦ∅]|\\(pi|infty)$", re.ASCII)


def _kind(token: str) -> str:
    """What a token is after a tree: an operator, a unit, or the beginning of a factor."""
    if token in _BINDING:
        return token
    if token[0] == '"':
        return "unit"
    return "function" if token in _FUNCTIONS else "product"


def _parse(tokens: list[str], level: int = 0) -> Tree:
    """The longest tree whose operators are above the level; tokens[-1] is the next one."""
    left = _operand(tokens, level)
    while True:
        kind = _kind(tokens[-1])
        if _BINDING[kind] <= level:
            return left
        if kind in ("product", "function"):
            left = ("*", left, _parse(tokens, _BINDING[kind]))
        elif kind == "unit":
            left = (tokens.pop(), left)
            if tokens[-1] == "^":  # cm^2
                tokens.pop()
                _operand(tokens, 9)
            if _kind(tokens[-1]) == "product":
                raise ValueError("2 hours 30 minutes")
        elif kind == "!":
            left = (tokens.pop(), left)
        else:
            right_level = 7 if kind == "^" else _BINDING[kind]  # 2^3^2 is 2^(3^2)
            left = (tokens.pop(), left, _parse(tokens, right_level))


def _operand(tokens: list[str], level: int) -> Tree:
    """A number, a name, or what begins with a sign, a function or a bracket."""
    token = tokens.pop()
    if _NUMBER.match(token) and _NUMBER.match(tokens[-1]):
        raise ValueError("4 5 is no product")
    if _ATOM.match(token):
        return token
    if token in ("+", "-"):
        return (token, "0", _parse(tokens, max(level, 5)))  # -x is 0-x
    if token in (r"\frac", r"\binom"):
        return (token, _operand(tokens, 9), _operand(tokens, 9))
    if token in _FUNCTIONS:  # \log[2]8, \sqrt[3]8
        parameters = [_operand(tokens, 9)] if tokens[-1] == "[" else []
        narrow = token == r"\sqrt" or tokens[-1] in ("(", "{")
        return (token, _parse(tokens, 8 if narrow else 6), *parameters)
    inner = _parse(tokens)
    pair = token + tokens.pop()
    if pair == "{}" or pair in ("()", "[]", "⟨⟩") and inner[0] != ",":
        return inner  # a group
    if pair not in _SHAPES and pair not in _OPERATIONS:
        raise ValueError(f"{pair} is no pair of brackets")
    return (pair, *_items(inner))


def _items(tree: Tree) -> list[Tree]:
    """The items of a list, or the tree alone."""
    if tree[0] != ",":
        return [tree]
    return _items(tree[1]) + _items(tree[2])


def _read(tokens: list[str]) -> list[Tree]:
    """The trees of an answer's items, with + for each ±, and those that differ with - for it.

    Raises whatever comes for what is no mathematics.
    """
    if len(tokens) > MAX_TOKENS:
        raise ValueError("too long")
    items = []
    for sign in "+-":
        rest = [sign if token == "±" else token for token in tokens]
        rest = ["∎", *reversed(rest)]
        tree = _parse(rest)
        if rest != ["∎"]:
            raise ValueError(f"{rest[-1]} is left")
        items += [item for item in _items(tree) if sign == "+" or item not in items]
    return items


# -- Step 3: spellings. A number is spelled by its digits, and a formula by its numbers at POINTS
# points, where each name has a number: x^2-1 and (x-1)(x+1) agree at all of them. Then lists are
# sorted, and x=5 is spelled twice: as 5 with the label x, and as the equation x-5=0.

_mp = mpmath.MPContext()  # a private one: anybody may set the precision of mpmath.mp

_mp.dps = 110

_CONSTANTS = {"i": _mp.j, "e": +_mp.e, r"\pi": +_mp.pi}

_INFINITE = {  # no numbers: 1/\infty is not read
    r"\infty": "+inf",
    ("+", "0", r"\infty"): "+inf",
    ("-", "0", r"\infty"): "-inf",
}


class _HasNames(Exception):
    """The number of the tree depends on the point."""


def _size(x: Number) -> float:
    """How long a number is, in bits; of one that is not exact, how far from 1."""
    if isinstance(x, Fraction):
        return max(x.numerator.bit_length(), x.denominator.bit_length()) - 1
    return abs(_mp.mag(x)) if x else 0


def _divide(a: Number, b: Number) -> Number:
    """a / b, where a Fraction cannot be divided by an mpf."""
    return a * (1 / b)


def _power(a: Number, b: Number) -> Number:
    """a^b, refused before it is built if it is too long: it has b times the bits of a."""
    if abs(b) * max(_size(a), 1) > MAX_BITS:
        raise ValueError("too long")
    exponent = int(b.real)
    return a**exponent if b == exponent else _mp.power(a, b)


def _factorial(n: Number) -> Number:
    """n!, and between whole numbers the gamma function."""
    if abs(n) > 3000:
        raise ValueError("too long")
    return Fraction(math.factorial(int(n))) if n == int(n) else _mp.gamma(n + 1)


def _binomial(n: Number, k: Number) -> Number:
    """n! / (k! (n - k)!)"""
    return _divide(_factorial(n), _factorial(k) * _factorial(n - k))


def _floor(x: Number) -> Number:
    r"""The whole number below, but 5.999... counts as 6: (\sqrt6)^2 may come out like that."""
    return Fraction(int(_mp.floor(x + _mp.mpf("1e-90"))))


def _root(x: Number, n: Number = 2) -> Number:
    r"""The principal root, but \sqrt[3]{-8} is -2."""
    if isinstance(x, Fraction) and x < 0 and n == 3:
        return -_power(-x, 1 / n)
    return _power(x, 1 / n)


def _logarithm(x: Number, base: Number = _mp.e) -> Number:
    r"""The natural one, or one with a base: \log[2]8 is 3."""
    if base in (0, 1):
        raise ValueError("no base")
    return _mp.log(x, base)


def _named(function: Callable) -> Callable:
    r"""The function with an exponent: \sin[2]x is \sin^2 x."""
    return lambda x, exponent=1: function(x) ** exponent


_FUNCTIONS = {
    r"\sqrt": _root,
    r"\log": _logarithm,
}

for _name in "sin cos tan sec csc cot sinh cosh tanh exp arcsin arccos arctan".split():
    _FUNCTIONS["\\" + _name] = _named(getattr(_mp, _name.replace("arc", "a")))

_OPERATIONS = _FUNCTIONS | {
    "+": add,
    "-": lambda a, b: a + -b,  # as an mpf cannot be taken from a Fraction
    "*": mul,
    "/": _divide,
    ":": _divide,
    "^": _power,
    "!": _factorial,
    r"\frac": _divide,
    r"\binom": _binomial,
    r"\choose": _binomial,
    r"\lvert\rvert": abs,
    r"\lfloor\rfloor": _floor,
    r"\lceil\rceil": lambda x: -_floor(-x),
}


def _letter(name: str, point: int | None) -> Number:
    """The number of a name at a point: near or far, by a hash, and at half of the points negative.

    After POINTS come the same points with positive numbers only.
    """
    if point is None:
        raise _HasNames
    code = zlib.crc32(f"{name} {point % 12}".encode())
    size = (1, 6, 40, 1000)[point % 4] * (1 + code / 2**32)
    negative = point < POINTS and (code + point // 12) % 2
    return _mp.mpf(-size if negative else size)


def _value(tree: Tree, point: int | None) -> Number:
    """The number of a tree at a point, or without one: exactly, as far as it is rational.

    Raises ValueError for what is undefined or too long, or not real at a point with negative names.
    """
    if isinstance(tree, str):
        if tree in _CONSTANTS:
            return _CONSTANTS[tree]
        if not _NUMBER.match(tree) and tree != r"\infty":
            return _letter(tree, point)
        return Fraction(tree) if point is None else _mp.mpf(tree)
    values = [_value(part, point) for part in tree[1:]]
    if tree[0][0] == '"':
        return values[0]
    x = _OPERATIONS[tree[0]](*values)
    unreal = isinstance(x, _mp.mpc) and point in range(POINTS)
    if unreal or not _size(x) <= MAX_BITS:  # no comparison is true of nan
        raise ValueError("undefined or too long")
    return x


def _at(tree: Tree, point: int) -> Number:
    """The number at a point; if it has a root of a negative number, then with positive names."""
    for place in (point, point + POINTS):
        with contextlib.suppress(Exception):
            return _value(tree, place)
    return _mp.nan


def _values(tree: Tree) -> list[Number]:
    """The number of a tree without names, in a list, or its numbers at all points."""
    with contextlib.suppress(_HasNames):
        return [_value(tree, None)]
    values = [_at(tree, point) for point in range(POINTS)]
    if all(x != x for x in values):  # only nan is not equal to itself
        raise ValueError("undefined")
    return values


def _digits(x: Number) -> str:
    """80 digits of a number, or all of a longer fraction: 2^{300}+1 is not 2^{300}."""
    if isinstance(x, Fraction) and _size(x) > 128:
        return f"{x.numerator:x}/{x.denominator:x}"
    return _mp.nstr(_mp.chop(_mp.convert(x), 1e-90), 80)


_FLIPPED = dict(zip("=≠<≤>≥", "=≠>≥<≤"))

_BOUNDS = {  # what a relation makes of the line (-inf; +inf)
    "=": ("(-inf; +inf)", "#"),
    "<": ("+inf)", "#)"),
    "≤": ("+inf)", "#]"),
    ">": ("(-inf", "(#"),
    "≥": ("(-inf", "[#"),
}

# In the print of a tree: a number or an operator at the start of a string, or a constant.
_NO_LABEL = re.compile(r"""['"]([-+^!.\d]|[ie]'|\\\\(pi|infty))""")


def _is_label(tree: Tree) -> bool:
    r"""Anything without numbers, sums and powers: x, (x, y), V_1:V_2, |AB|, \sin A.

    Also e and i, as in d=4, e=5.
    """
    return tree in ("e", "i") or not _NO_LABEL.search(str([tree]))


def _labelled(tree: Tree) -> tuple[str, str]:
    r"""A label and the spelling of the rest: x=5 is x and 5.0, 3<x is x and (3.0; +inf)."""
    if tree[0] not in _RELATIONS:
        return "", _spell(tree)
    sign, name, value = tree
    before = "(-inf; +inf)"
    if name[0] in _RELATIONS:  # 0<x<1 is (0<x)<1
        before = _labelled(name)[1]
        name = name[2]
    elif not _is_label(name):
        sign = _FLIPPED[sign]
        name, value = value, name
    old, new = _BOUNDS[sign]
    if not _is_label(name) or old not in before:
        raise ValueError("no value for a name")
    label = re.sub("[(),' ]+", " ", str(name))
    return label.strip(), before.replace(old, new.replace("#", _spell(value)))


def _moved(tree: Tree) -> str:
    """A relation up to moved terms and a factor, of an inequality a positive one: 2x>4 is x-2>0."""
    sign, left, right = tree
    if sign in "<≤":
        sign = _FLIPPED[sign]
        left, right = right, left
    values = _values(("-", left, right))
    scale = next(x for x in values if abs(x) > 0)
    if sign in ">≥":
        scale = abs(scale)
    if len(values) == 1:
        raise ValueError("a statement about numbers")
    return "|".join(_digits(x / scale) for x in values) + sign + "0"


def _spell(tree: Tree) -> str:
    """The spelling that all trees of the same meaning have, without labels and units."""
    items = _items(tree)
    if len(items) > 1:
        return "{" + "; ".join(sorted(map(_spell, items))) + "}"
    if tree in _INFINITE:
        return _INFINITE[tree]
    if tree[0] in _SHAPES:
        return tree[0][0] + "; ".join(map(_spell, tree[1:])) + tree[0][1]
    digits = [_digits(x) for x in _values(tree)]
    return "|".join(digits) if len(set(digits)) > 1 else digits[0]  # \sin^2 x+\cos^2 x is 1


def _spellings(items: list[Tree]) -> Iterator[tuple[str, set]]:
    """Each (spelling, labels) of an answer's items; the labels are a set of one or none."""
    if len(items) == 1 and items[0][0] in _RELATIONS:
        with contextlib.suppress(Exception):  # x \in (0,1) is no equation
            yield _moved(items[0]), set()
    labelled = [_labelled(item) for item in items]
    spelled = [spelling for _, spelling in labelled]
    labels = dict.fromkeys(label for label, _ in labelled if label)
    names = {" ".join(labels)} if labels else set()
    in_order = "; ".join(spelled)
    yield in_order, names  # -5, 14/3 beside x=-5, p=14/3
    if len(labels) < len(items):
        yield "{" + "; ".join(sorted(spelled)) + "}", names
    elif len(items) > 1:  # a=1, b=2 is b=2, a=1 and (1, 2)
        yield str(sorted(labelled)), set()
        yield f"({in_order})", names


@lru_cache(maxsize=1 << 16)
def _readings(text: str) -> dict[str, tuple]:
    """{spelling: (labels, units)} for each meaning of a text, and for its words.

    Kept for the gold answer, which meets many predictions, and for predictions that come again.
    """
    if len(text) > MAX_CHARS:
        return {}
    text = _respell(text)
    words = re.sub(r'"| (?!\d)', "", " ".join(_tokens(text)))
    readings = {}
    meanings = [re.sub(old, new, text) for old, new in _OTHER_MEANINGS]
    for meaning in dict.fromkeys([text, *meanings]):
        tokens = _tokens(meaning)
        units = {re.match(r'".?\d*', token)[0] for token in tokens if token[0] == '"'}
        with contextlib.suppress(Exception):  # it is no mathematics, or too long
            for spelling, labels in _spellings(_read(tokens)):
                readings[spelling] = labels, units
    if words:
        # Of an answer that is mathematics, the words are its label, too.
        labels = {words} if readings else set()
        readings["words " + words.lower()] = labels, set()
    return readings


def parses(text: str) -> bool:
    r"""Whether the text reads as mathematics throughout; words do not, not even as \text{...}.

    >>> [parses(text) for text in ("a= 56 ,b= 54", r"\frac{3}{4}", "x+", "4=5=6", "hello world")]
    [True, True, False, False, False]
    """
    return len(_readings(text)) > 1  # one is the text as words, and it is always there


def _rounded(readings: dict[str, tuple]) -> dict[str, tuple]:
    """Readings with ten digits of each number, for 0.0833333333333333 beside 1/12."""
    rounded = {}
    for spelling, labels in readings.items():
        rounded[re.sub(r"\d+\.\d+", lambda n: f"{float(n[0]):.9e}", spelling)] = labels
    return rounded


def answers_equal(prediction: str, gold: str) -> bool:
    r"""Whether two answers are the same mathematics, or else the same words; never an exception.

    >>> answers_equal(r"2\sqrt2", r"\sqrt{8}"), answers_equal("b=2, a=1", "a=1,b=2")
    (True, True)
    >>> answers_equal("(1,2)", "(2,1)")
    False
    """
    if prediction.strip() == gold.strip():
        return True
    predicted = _readings(prediction)
    wanted = _readings(gold)
    if re.search(r"\.\d{12}", prediction + " " + gold):
        predicted = _rounded(predicted)
        wanted = _rounded(wanted)
    for spelling in predicted.keys() & wanted.keys():
        pairs = zip(predicted[spelling], wanted[spelling])  # labels with labels, units with units
        if all(not ours or not theirs or ours & theirs for ours, theirs in pairs):
            return True
    return False


# ======== 14. The run folder: how does a run survive being killed? ================================

# A run takes minutes, or weeks, and whatever stops it (Ctrl-C, a full disk, the end of a job's
# time) must not cost more than one step. So the State is written after each outer step, and holds
# all that the next one needs. A run that is killed in between repeats the step from the last
# checkpoint and, all randomness being a function of (seed, step), writes the same files again.
#
# Four things would spoil that silently, and are prevented here: a file that is half written, two
# processes in one folder, a --resume with other flags, and a damaged file that is taken for a
# whole one. A damaged file is named and left alone: its owner may have a copy.

# What --resume may change: where and how fast the run goes on, not what it computes. (On another
# device last bits differ, and with them the course of the run.)
RESUMABLE = (
    "resume",
    "out",
    "sample_tokens",
    "micro_tokens",
    "checkpointing",
    "threads",
    "processes",
    "cache",
    "device",
)

LOCK = ".lock"


@contextlib.contextmanager
def claim(folder: Path) -> Iterator:
    """Makes the folder, and keeps every other process out of it while the block runs.

    Two runs that write into one folder would both end well, with files that are a mixture. The
    system drops the lock when the process ends, however it ends, so a killed run leaves nothing to
    clean up. Raises UserError where another process is in there.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / LOCK, "a")
    with file:
        try:
            if os.name == "nt":
                import msvcrt

                msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
            else:
                import fcntl

                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN, errno.EDEADLK):
                raise UserError(
                    f"another process writes into {folder}; wait for it, or choose another folder"
                ) from None
            print(f"(no locks on this file system: nothing else must write into {folder})")
        yield


def check_folder(config: Config) -> None:
    """Raises UserError when --out holds what this command must not touch or cannot continue."""
    folder = Path(config.out)
    check_writable(folder)
    begun = [file for file in folder.iterdir() if file.name != LOCK]
    if begun and not (folder / "config.json").is_file():
        raise UserError(f"{folder} exists and is not a run of soar.py; choose another --out")
    check_writable(Path(config.cache))
    if not begun:
        if config.resume:
            print(f"{folder} holds no run yet: this one begins at its beginning")
        return
    if not config.resume:
        raise UserError(
            f"{folder} already holds a run; add --resume to continue it, or choose another --out"
        )
    saved = vars(saved_config(folder))
    other = []
    for name, value in vars(config).items():
        if name not in RESUMABLE and saved[name] != value:
            other.append(f"{flag(name)} {saved[name]}")
    if other:
        raise UserError(
            f"the run in {folder} was made with {', '.join(other)}; give the same flags, "
            "or choose another --out"
        )
    # The log is written just before the checkpoint: after the first step it may stand alone.
    log = folder / "log.jsonl"
    rows = log.read_bytes().count(b"\n") if log.exists() else 0
    if rows > 1 and not (folder / "checkpoint.pt").exists():
        raise UserError(
            f"{folder} has lost its checkpoint.pt; put a copy back, or choose another --out"
        )


def check_writable(path: Path) -> None:
    """Makes a folder where there is none. Raises UserError where nothing can be written."""
    with writing(path):
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()


def saved_config(folder: Path) -> Config:
    """The flags that a run was made with. Raises UserError unless they are this soar.py's."""
    path = folder / "config.json"
    with reading(path, "if another version of soar.py has made it, make the run again"):
        saved = json.loads(path.read_text(encoding="utf-8"))
        found = {name: type(value) for name, value in saved.items()}
        require(found == {name: type(value) for name, value in vars(Config()).items()})
    return Config(**saved)


def save_checkpoint(folder: Path, state: State) -> None:
    """Writes the .jsonl files anew, and then the checkpoint, each of them all or nothing.

    A run that is killed between them repeats its step, and writes the same lines once more.
    """
    for name in ("log", "questions", "promotion_questions"):
        lines = [json.dumps(row) + "\n" for row in getattr(state, name)]
        if lines:
            write_text(folder / f"{name}.jsonl", "".join(lines))
    write_atomically(folder / "checkpoint.pt", lambda file: torch.save(vars(state), file))


def load_checkpoint(folder: Path) -> State | None:
    """The state after the last complete step, or None. Raises UserError when it is damaged."""
    path = folder / "checkpoint.pt"
    if not path.exists():
        return None
    with reading(path, "put a copy back, or start again with another --out"):
        # torch.save writes a zip file, with checksums that torch.load does not look at.
        with zipfile.ZipFile(path) as archive:
            require(archive.testzip() is None)
        return State(**torch.load(path, weights_only=True))


def save_model(model: nn.Module, tokenizer: object, folder: Path) -> None:
    """Writes an ordinary folder for from_pretrained. Raises UserError.

    A run that is killed while it writes repeats its step, and writes the folder once more.
    """
    temporary = folder.with_name(folder.name + ".tmp")
    with writing(folder):
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)


def write_atomically(path: Path, write: Callable) -> None:
    """write(path), all or nothing: a run that is killed while writing leaves the old file.

    The temporary name is this process's own, since several runs may share one --cache. Raises
    UserError.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            write(temporary)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes a text file, all or nothing. Raises UserError."""
    write_atomically(path, lambda file: file.write_text(text, encoding="utf-8"))


def write_json(path: Path, value: object) -> None:
    """Writes a value as JSON, all or nothing. Raises UserError."""
    write_text(path, json.dumps(value, indent=1))


@contextlib.contextmanager
def writing(path: Path) -> Iterator:
    """Whatever goes wrong in the block is the disk's doing: full, read-only, gone -> UserError."""
    try:
        yield
    except Exception as error:  # torch and safetensors have their own kinds for a full disk
        raise UserError(
            f"cannot write {path} ({first_line(error)}); free some space, or choose another --out "
            "or --cache; the same command (soar.py: with --resume) goes on from what is saved"
        ) from None


@contextlib.contextmanager
def reading(path: Path, advice: str) -> Iterator:
    """Whatever goes wrong in the block means that our file is damaged -> UserError, with advice."""
    try:
        yield
    except Exception:  # torch.load alone raises a dozen kinds
        raise UserError(f"{path} is damaged; {advice}") from None


def require(condition: bool) -> None:
    """Within reading(): what our file must fulfil. (An assert would vanish under python -O.)"""
    if not condition:
        raise ValueError


# ======== 15. Many processes: how are all cores, or all GPUs, put to work? ========================

# Nearly all the time goes into students, and these do not need each other. So process 0 runs the
# program, and the others, its workers, have a model of their own and wait for jobs: students, parts
# of the filter, fresh students of eval.py. What is short process 0 does itself; so there is one
# teacher, one baseline and one log, and no gradient ever travels.
#
# A job is a function of its arguments, never of the jobs before it. So any number of processes
# comes to the same numbers, to the last bit where the hardware computes the same twice.
#
# Workers come from multiprocessing, with a pipe to each, or from torchrun, which can also start
# them on other machines. Process 0 sees no difference: a channel to a worker has send and recv.
# An error in a worker is told by process 0, and no worker outlives it.

# Whether torchrun has started this process: ALL these variables are set. Some of them may be left
# over from another program, and then this process would wait for others that never come.
TORCHRUN = {
    "TORCHELASTIC_RUN_ID",
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "MASTER_ADDR",
} <= os.environ.keys()
RANK = int(os.environ["RANK"]) if TORCHRUN else 0


def share(
    policy: Policy,
    task: Callable,
    common: tuple,
    jobs: list[tuple],
    title: str = "",
    costs: list[float] | None = None,
) -> Iterator:
    """Yields task(policy, *common, *job) for each job, in their order.

    Each job goes to the process that has least to do so far: with jobs of one cost, job i to
    process i mod N. A title means a progress bar, and that the meter counts the jobs. Raises what
    a task raises, and UserError where a worker has died.
    """
    load = [0.0] * (1 + len(policy.workers))  # of each process; 0 is this one
    owners = []  # of each job
    for cost in costs or [1.0] * len(jobs):
        owner = load.index(min(load))
        owners.append(owner)
        load[owner] += cost
    # All get their jobs before process 0 begins with its own.
    for number, worker in enumerate(policy.workers, start=1):
        its_jobs = [job for job, owner in zip(jobs, owners) if owner == number]
        reach(worker.send, (policy.source, task, common, its_jobs))
    hidden = None if title else True  # None: shown on a terminal only
    pairs = zip(jobs, owners, strict=True)
    for job, owner in tqdm(pairs, title, len(jobs), leave=False, disable=hidden):
        if owner == 0:
            result = task(policy, *common, *job)
        else:
            result = reach(policy.workers[owner - 1].recv)
        if isinstance(result, Exception):  # which the task has raised there
            raise result
        if title:
            policy.meter.advance()
        yield result


def reach(send_or_recv: Callable, *message: tuple) -> object:
    """Speaks with a worker. Raises UserError when it has died."""
    try:
        return send_or_recv(*message)
    except (EOFError, OSError, RuntimeError):  # of pipes, and of torch.distributed
        raise UserError(
            "another process of this run has died, perhaps for lack of memory; "
            "go on with --resume and with fewer --processes"
        ) from None


# -- A worker's life. A channel is one end of a pipe, or a Remote (below).


def serve(channel: Connection | Remote, number: int) -> None:
    """Does jobs and sends each result, or what it raised, until None comes in place of jobs."""
    sys.stdout = sys.stderr = open(os.devnull, "w")  # only process 0 speaks
    quiet_libraries()
    policy = None
    while message := channel.recv():
        source, task, common, jobs = message
        for job in jobs:
            try:
                if policy is None or policy.source != source:
                    policy = load_copy(source, number)
                result = task(policy, *common, *job)
            except Exception as error:
                result = error
            channel.send(result)


def load_copy(source: tuple[str, Config], number: int) -> Policy:
    """The policy of process 0 once more; on GPUs, the workers go round the cards."""
    path, config = source
    if config.threads:
        torch.set_num_threads(config.threads)
    if choose_device(config) == "cuda":
        card = number % torch.cuda.device_count()
        config = dataclasses.replace(config, device=f"cuda:{card}")
    policy = load_policy(path, config, Meter())
    policy.source = source
    return policy


# -- How workers start and end.


@contextlib.contextmanager
def workers(policy: Policy, config: Config, jobs: int) -> Iterator:
    """The policy has workers while the block runs: torchrun's, or as many as `jobs` are worth.

    Where the block raises nobody tells them; they end because process 0 does (local_worker).
    """
    if TORCHRUN:
        policy.workers = [Remote(rank) for rank in range(1, dist.get_world_size())]
    else:
        count = process_count(policy, config, jobs)
        policy.workers = [start_worker(number) for number in range(1, count)]
    yield
    for worker in policy.workers:
        with contextlib.suppress(OSError, RuntimeError):
            worker.send(None)


def start_worker(number: int) -> Connection:
    """Starts a process on this machine -> the channel to it."""
    # "spawn", because a forked process cannot use a GPU that this one has touched.
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    # Ctrl-C is for process 0. The child inherits that it is ignored, also while it starts.
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    context.Process(target=local_worker, args=(theirs, number), daemon=True).start()
    signal.signal(signal.SIGINT, before)
    theirs.close()  # only the worker has it now: if it dies, recv() says so
    return ours


def local_worker(channel: Connection, number: int) -> None:
    """serve() in a process that start_worker has started, which ends with process 0."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def end_with_parent() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    # In the middle of a job nobody listens to the channel; and process 0 may have been killed.
    threading.Thread(target=end_with_parent, daemon=True).start()
    with contextlib.suppress(EOFError, OSError):
        serve(channel, number)


def process_count(policy: Policy, config: Config, jobs: int) -> int:
    """--processes, or by default on CPUs one a core, as far as jobs and memory go.

    On GPUs the default is one, since other cards may be somebody else's. Several may share a card
    that holds them: in sampling a card mostly waits for Python, so together they are quicker.
    """
    if config.processes:
        return config.processes
    if policy.model.device.type != "cpu":
        return 1
    # On Linux those that this process may use.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    # Two copies of the weights, base weights, gradients and moments are 24 bytes a weight. 40 bytes
    # leave room for activations, 0.6 GB are for Python and torch, and half of the rest stays free.
    memory = 0.6e9 + 40 * sum(w.numel() for w in policy.base)
    return int(max(1, min(cores, jobs, free_memory() / 2 // memory)))


def free_memory() -> float:
    """Bytes; where the system does not tell, what any computer has to spare."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable"):
                return 1024.0 * int(line.split()[1])
    return 4e9


# -- torchrun starts all processes itself, each as `soar.py` with a RANK of its own.


class Remote:
    """A channel to another process of torchrun, on this machine or another."""

    def __init__(self, rank: int):
        self.rank = rank

    def send(self, value: object) -> None:
        dist.send_object_list([value], dst=self.rank)

    def recv(self) -> object:
        box = [None]
        dist.recv_object_list(box, src=self.rank)
        return box[0]


def serve_torchrun() -> bool:
    """Joins the processes of torchrun, if there are any. All but process 0 serve in here.

    -> whether this process was such a worker, and has nothing left to do.
    """
    if TORCHRUN:
        patience = datetime.timedelta(days=1)  # a student can take long
        dist.init_process_group("gloo", timeout=patience)
    if RANK:
        serve(Remote(0), int(os.environ["LOCAL_RANK"]))
    return RANK > 0


# ======== 16. Flags and main: what does a person type, and see? ===================================

# main() is all that happens between a command line and an exit code, and run() is the order in
# which the parts are called. Two rules stand behind the rest.
#
# Whoever waits must know for what. So the plan is printed before the work, with its cost and the
# meaning of each column; every step prints a line, and every fifth an example; and the end says
# what came of it, and what to type next.
#
# A mistake costs seconds, not hours. So flags, folders, the disk and the length of the longest
# problem are checked before anything long begins; and what the user can mend is told in one
# sentence, with exit code 2, that says what to do. A traceback is always a bug of ours.


def main(argv: list[str]) -> int:
    """Command line -> exit code: 0, 2 after a mistake of the user, 130 after Ctrl-C.

    Under torchrun all processes come in here, and all but one leave at serve_torchrun().
    """
    prepare_screen()
    meter = Meter()

    def body() -> None:
        if serve_torchrun():  # this process was a worker, and is done
            return
        config = parse_config(argv)
        quiet_libraries()
        run(config, meter)

    again = ["python", "soar.py", *argv]
    if "--resume" not in argv:
        again.append("--resume")
    return exit_code("soar", body, meter, again)


def run(config: Config, meter: Meter) -> None:
    """Everything, from the flags to the closing tables. Raises UserError.

    With --resume all of it happens again, but the filter is read from the cache, and the outer loop
    begins where the checkpoint was written.
    """
    check_folder(config)
    folder = Path(config.out)
    with claim(folder):
        policy, pool = prepare(config, meter)
        check_disk(policy, folder)
        print_plan(pool, policy, config)
        with workers(policy, config, students_a_step(config)):
            hard = hard_problems(policy, pool, config)
            hard_train, hard_test = split_hard(hard, config)
            print(
                f"{len(hard)} of {len(pool)} problems are fail@{config.fail_k}: "
                f"{len(hard_train)} for the reward, {len(hard_test)} held out\n"
            )
            state = first_state(policy, hard_train, hard_test, config)
            # It makes the folder a run: until now the same command works without --resume.
            write_json(folder / "config.json", vars(config))
            outer_loop(policy, hard_train, state, config)
        # The student is there already: promote() has saved each that was the best so far.
        restore(policy.model, state.teacher)
        save_model(policy.model, policy.tokenizer, folder / "teacher")
        report(policy, hard_train, hard_test, state, config)


def prepare(config: Config, meter: Meter) -> tuple[Policy, list[Problem]]:
    """The policy and the pool of problems, for soar.py and eval.py. Raises UserError.

    The pool depends on --data-seed and not on --seed, so that runs with different seeds can be
    compared on the same problems.
    """
    # What is cheap to check comes first, before anything is loaded: the device, the prompt files.
    choose_device(config)
    read_prompt(config.teacher_prompt, TEACHER_PROMPT)
    read_prompt(config.student_prompt, STUDENT_PROMPT, "{problem}")
    if config.threads:
        torch.set_num_threads(config.threads)
    if config.dataset == "tiny":
        pool = hard_worksheets(make_world(config.data_seed), config.pool, config.data_seed)
        model = tiny_base_model(config)
    else:
        pool = load_problems(config.dataset, config.cache)
        if 0 < config.pool < len(pool):
            pool = random.Random(f"pool {config.data_seed}").sample(pool, config.pool)
        model = config.model
    policy = load_policy(model, config, meter)
    check_context(policy, pool, config)
    return policy, pool


def first_state(
    policy: Policy, hard_train: list[Problem], hard_test: list[Problem], config: Config
) -> State:
    """Where the run begins, or goes on. Raises UserError when it would go on with other inputs.

    Flags alone do not tell: the file behind a flag may have changed since the run began, and what
    was trained on would be among the tests.
    """
    inputs = fingerprint(
        weights_key(policy.base),
        policy.teacher_prompt(),
        policy.student_prompt(Problem("", "")),
        hard_train,
        hard_test,
    )
    state = load_checkpoint(Path(config.out))
    if state is None:
        return State(policy.base, adamw_state(policy.model, "cpu"), policy.base, inputs)
    if state.inputs != inputs:
        raise UserError(
            f"the run in {config.out} began with another model, other prompts or other problems: "
            "has a file changed? Put it back, or choose another --out"
        )
    return state


def outer_loop(policy: Policy, hard_train: list[Problem], state: State, config: Config) -> None:
    """The outer steps that are left, each with its checkpoint and its line on the screen.

    A step is printed when it is saved, so whoever has seen its line will not lose it. `cost` is the
    one part of a row that differs from machine to machine.
    """
    meter = policy.meter
    students = (config.steps - state.step) * students_a_step(config)
    meter.expect(students, "all outer steps", 1 + len(policy.workers))
    while state.step < config.steps:
        meter("other")
        meter.seconds.clear()
        meter.tokens.clear()
        row = outer_step(policy, hard_train, state, config)
        meter("saving")
        training = meter.seconds["training"] or math.inf  # no time: nothing was trained
        row["cost"] = {
            "seconds": dict(meter.seconds),
            "peak_memory_gb": peak_memory_gb(policy.model.device),
            "tokens_per_second": {
                "sampled": meter.tokens["sampled"] / meter.seconds["sampling"],
                "trained": meter.tokens["trained"] / training,
            },
        }
        save_checkpoint(Path(config.out), state)
        print_step(row, meter)
        meter.told = True  # by this line, and the next ones
        if row["step"] % 5 == 0:
            print_example(policy, state, config)


# -- How it ends: an exit code and, where something is wrong, one sentence.


def exit_code(program: str, body: Callable, meter: Meter, again: list[str]) -> int:
    """Runs body() -> 0; 2 after what the user can mend, told in one sentence; 130 after Ctrl-C.

    `again` is the command that goes on where an interrupted one stopped. All other errors are
    bugs, and end in a traceback. The meter knows in which phase the memory ran out.
    """
    command = shlex.join(again)
    code = 2
    try:
        body()
        return 0
    except UserError as error:
        sentence = error
    except BrokenPipeError:  # as in `soar.py | head`
        sys.stdout = open(os.devnull, "w")  # or Python's own last flush would fail once more
        sentence = f"nobody reads what it prints any more, so it has stopped; go on with: {command}"
    except KeyboardInterrupt:
        code = 130  # 128 + SIGINT, as shells have it
        sentence = f"interrupted; all complete steps are saved, go on with: {command}"
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        sentence = (
            f"out of memory (phase: {meter.phase}); in sampling lower --sample-tokens, in training "
            "lower --micro-tokens or add --checkpointing, else take fewer --processes or a smaller "
            f"--model; go on with: {command}"
        )
    print(f"{program}: {sentence}", file=sys.stderr, flush=True)
    return code


def is_out_of_memory(error: Exception) -> bool:
    """Of a CPU, and of memory that a CUDA library asked for, PyTorch says it in words only."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    # Other errors of CUDA are no lack of memory, and smaller batches would only hide them.
    words = "allocate memory|not enough memory|out of memory|ALLOC_FAILED"
    return re.search(words, str(error)) is not None


def check_disk(policy: Policy, folder: Path) -> None:
    """Raises UserError when the run's files cannot fit on the disk.

    These are two checkpoints side by side (teacher, baseline and float32 moments), since the old
    one stays until the new one is written, and the saved teacher and student, one of them twice.
    """
    weights = sum(w.numel() for w in policy.base)
    size = policy.base[0].element_size()  # bytes a weight
    needed = weights * (2 * (2 * size + 8) + 3 * size) / 1e9
    free = shutil.disk_usage(folder).free / 1e9
    if needed > 1:
        print(f"The run needs up to {needed:.0f} GB of the disk; {free:.0f} GB are free.\n")
    if needed > free:
        raise UserError(
            f"the run needs up to {needed:.1f} GB in {folder}, and {free:.1f} GB are free; "
            "free some space, or choose an --out on another disk"
        )


def check_context(policy: Policy, pool: list[Problem], config: Config) -> None:
    """Raises UserError when a prompt and its completion may not fit into the model's context.

    Most models go on writing beyond it, only worse, and nothing else would tell.
    """
    model = policy.model.config.get_text_config()
    context = getattr(model, "max_position_embeddings", None) or math.inf
    rope = getattr(model, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":
        # Beyond this length it turns by other angles, and the cache holds the first ones.
        context = min(context, rope.get("original_max_position_embeddings") or context)
    lengths = [len(policy.student_prompt(problem)) for problem in pool]
    longest = pool[lengths.index(max(lengths))].question[:60]
    empty = len(policy.student_prompt(Problem("", "")))
    needed = {
        f"the problem that begins {longest!r}": max(lengths) + config.student_tokens,
        "the teacher's prompt": len(policy.teacher_prompt()) + config.teacher_tokens,
        "a problem of --teacher-tokens": empty + config.teacher_tokens + config.student_tokens,
    }
    for what, tokens in needed.items():
        if tokens > context:
            raise UserError(
                f"{what} needs {tokens} tokens with its completion, and the model's context has "
                f"{context}; lower --student-tokens or --teacher-tokens, or leave long problems out"
            )


def peak_memory_gb(device: torch.device) -> float:
    """The most memory so far, of the GPU or, on a CPU, of this process alone, without its workers.

    0 where the system does not tell.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    with contextlib.suppress(ImportError):  # on Windows there is no such module
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / (1e9 if sys.platform == "darwin" else 1e6)  # bytes on a Mac, else kilobytes
    return 0.0


# -- Flags. Every field of Config is one, so what is added there needs nothing here, unless zero is
# a bad value for it.

# For which machine a preset is, with every completion at its limit (measured: assets/results.md).
MACHINES = {
    "tiny": "any CPU: the tiny world, in minutes",
    "class": "one GPU with 15 GB or more, 20 GB of RAM: a short run, for an afternoon",
    "long": "one GPU with 15 GB or more, 20 GB of RAM: more steps, students and tokens",
    "paper": "one GPU with 80 GB (or several): Table 3; weeks on one",
    "smoke": "any CPU or GPU: does it run at all?",
}

# The fields that open a group in --help.
FLAG_GROUPS = {
    "dataset": "The run",
    "fail_k": "The hard set",
    "teacher_prompt": "Prompts",
    "temperature": "Sampling",
    "steps": "The teacher",
    "inner_steps": "The student",
    "kl": "Both updates",
    "reward": "Reward and promotion",
    "sample_tokens": "Memory and report",
}
# The least value of a flag that is a number; 1, where it is not here.
LEAST = {
    "seed": -math.inf,
    "data_seed": -math.inf,
    "tau": -math.inf,
    "pool": 0,
    "processes": 0,
    "threads": 0,
    "teacher_warmup": 0,
    "student_warmup": 0,
    "inner_extra": 0,
    "teacher_lr": 0,
    "student_lr": 0,
    "kl": 0,
    "weight_decay": 0,
    "clip": 0,
    "temperature": 0.01,
    "teacher_group": 2,  # in a group of one there are no others to compare with
    "student_group": 2,
}


def flag(name: str) -> str:
    """A field's name as it is typed."""
    return "--" + name.replace("_", "-")


def parse_flags(
    parser: argparse.ArgumentParser, settings: type, groups: dict[str, str], argv: list[str]
) -> dict:
    """The flags that were given, {field: value}; every field of the dataclass is a flag.

    groups: {the first field of a group in --help: its title}. Raises UserError.
    """

    def fail(message: str) -> None:
        raise UserError(f"{message}; --help shows all flags")

    parser.error = fail  # argparse would print the usage, too, and leave
    group = parser
    for entry in dataclasses.fields(settings):
        if entry.name in groups:
            group = parser.add_argument_group(groups[entry.name])
        kind = {"type": type(entry.default)}
        if isinstance(entry.default, bool):
            kind = {"action": argparse.BooleanOptionalAction}
        text = f"{entry.metadata['help']} [{entry.default}]".replace("%", "%%")
        # SUPPRESS: a flag that equals the default must beat the preset, so the two must differ.
        group.add_argument(flag(entry.name), default=argparse.SUPPRESS, help=text, **kind)
    return vars(parser.parse_args(argv))


def presets_help() -> str:
    """The presets, their machines and what they set, as --help shows them."""
    text = ""
    for name, preset in PRESETS.items():
        settings = " ".join(f"{field}={value}" for field, value in preset.items())
        text += f"  {name:8}for {MACHINES[name]}\n"
        text += textwrap.indent(textwrap.fill(settings, 80), " " * 10) + "\n"
    return text


def parse_config(argv: list[str]) -> Config:
    """Command line -> Config. Flags win over the preset, the preset over the defaults.

    Raises UserError on bad values.
    """
    parser = argparse.ArgumentParser(
        usage="python soar.py [--dataset NAME] [--preset NAME] [flags]",
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=f"""SOAR: a teacher that is paid by its student's progress.
Defaults (in brackets) are the paper's; presets change only what they name:
{presets_help()}""",
    )
    flags = parse_flags(parser, Config, FLAG_GROUPS, argv)
    # The preset is chosen by the flags, and then overruled by them.
    preset = flags.get("preset", "auto")
    if preset == "auto":
        preset = "tiny" if flags.get("dataset", "tiny") == "tiny" else "class"
    if preset not in PRESETS:
        raise UserError(f"--preset {preset} does not exist; choose one of {', '.join(PRESETS)}")
    config = Config(**PRESETS[preset] | flags)
    config.preset = preset
    config.out = config.out or f"runs/{Path(config.dataset).stem}-{config.seed}"
    check_values(config)
    return config


def check_values(config: Config) -> None:
    """Raises UserError on values that cannot work, which would show after hours otherwise."""
    check_numbers(config, LEAST, 1)
    if not config.dataset:
        raise UserError("--dataset needs a name: tiny, math, harp, olympiad or a FILE.jsonl")
    if config.dataset == "tiny" and not 2 <= config.pool <= 100_000:
        raise UserError("--pool must be from 2 to 100000 in the tiny world: its problems never end")
    if config.reward not in ("grounded", "learnability"):
        raise UserError("--reward must be one of grounded, learnability")
    if (config.dataset == "tiny") != (config.model == "tiny"):
        raise UserError("the tiny data set and the tiny model belong together: give both, or none")


def check_numbers(flags: object, least: dict[str, float], otherwise: float) -> None:
    """Raises UserError where a number among the fields of `flags` is too small, or not finite.

    least: {field: its least value}; `otherwise` holds for fields that are not there.
    """
    for name, value in vars(flags).items():
        if type(value) not in (int, float):
            continue
        bound = least.get(name, otherwise)
        if not bound <= value < math.inf:  # so NaN is refused, too
            raise UserError(f"{flag(name)} must be a finite number, at least {bound}, not {value}")
    if getattr(flags, "threads", 0) > 4 * os.cpu_count():
        raise UserError(f"--threads must be at most four for each of the {os.cpu_count()} cores")


# -- The screen, before and during the work.


def students_a_step(config: Config) -> int:
    """Jobs of an outer step for share(): students, or datasets where none is trained."""
    K = config.teacher_batch * config.teacher_group
    return K * config.repeats if config.reward == "grounded" else K


def student_completions(config: Config, promotions: int, questions: int) -> int:
    """What the students of one outer step sample, after so many promotions.

    In training, and greedily on the questions: each student, and the baseline once.
    """
    students = students_a_step(config)
    if config.reward == "learnability":
        return students * config.n * LEARNABILITY_SAMPLES
    steps = config.inner_steps + config.inner_extra * promotions
    training = students * steps * config.student_batch * config.student_group
    return training + (students + 1) * questions


def print_plan(pool: list[Problem], policy: Policy, config: Config) -> None:
    """What is going to happen and what it costs, before it starts, and how to read the steps.

    The figures are nearly always upper bounds: most problems leave the filter early, and most
    completions end before their limit; promotions and rejected proposals add to them. What it
    costs in time the meter says, when the first pieces are done.
    """
    K = config.teacher_batch * config.teacher_group
    in_filter = len(pool) * config.fail_k
    in_step = student_completions(config, 0, config.reward_questions)
    by_students = in_filter + config.steps * in_step
    by_teacher = config.steps * K * config.n
    completions = by_students + by_teacher
    tokens = by_students * config.student_tokens + by_teacher * config.teacher_tokens
    where = f"{policy.model.dtype} on {policy.model.device}".removeprefix("torch.")
    if config.dataset != "tiny" and config.device == "auto" and missing_gpu():
        where += f" (no GPU: {missing_gpu()})"
    size = f"{config.student_batch} x {config.student_group}"
    task = f"{config.repeats} students train on each, {config.inner_steps} steps of {size}"
    if config.reward == "learnability":
        task = f"the student, as it is, tries each problem {LEARNABILITY_SAMPLES} times"
    print(f"""\
SOAR on {config.dataset}: {len(pool)} problems, model {config.model}, {where}, folder {config.out}
  filter      keep the problems that the model fails {config.fail_k} times of {config.fail_k}:
              at most {in_filter:,} completions
  outer step  the teacher writes {K} datasets of {config.n} problems;
              {task}: {in_step:,} student completions
  in all      {config.steps} outer steps: {completions:,} completions, at most {tokens:,} tokens
""")
    print_columns(config)


def print_columns(config: Config) -> None:
    """What each column of a step's line says, in a run with these flags."""
    reward = """the share of the hard questions that a student gains by training on the
                     teacher's problems, on average over the students; below zero it did harm"""
    if config.reward == "learnability":
        reward = """1 - s, on average over the teacher's problems, where s is the share of right
                     answers of the student, which does not train; 0 where s is 0"""
    promotion = f"""above {config.tau:g} (tau) a student is promoted: it becomes the
                     baseline, from which later students start and over which they must gain"""
    if config.inner_extra:
        promotion += f", and their inner loop gets {config.inner_extra} steps longer"
    if config.reward == "learnability" or not config.promotion or config.steps < config.window:
        promotion = "nobody can be promoted in this run"
    print(f"""\
What the columns of a step say:
  reward             {reward}
  best dataset       the largest mean reward of one dataset
  moving average     of the last {config.window} rewards; {promotion}
  right in training  the share of right answers of the students to the teacher's problems
  accepted           the share of the teacher's completions that hold a problem, and an answer that
                     can be read
""")


PROMOTION = """\
          PROMOTION: student {student} of dataset {dataset} is the new baseline:
          {accuracy:.1%} greedy on the hard train set. Its problems join the promotion questions.
          From now on rewards are gains over this better student."""


def print_step(row: dict, meter: Meter) -> None:
    """A line about an outer step, the columns of which print_plan explains, and its promotion."""
    best = max(np.mean(rewards) for rewards in row["rewards"])
    seconds = sum(row["cost"]["seconds"].values())
    print(
        f"step {row['step']:3d}  reward {row['reward']:+.3f}  best dataset {best:+.3f}  "
        f"moving average {row['average']:+.3f}  "
        f"right in training {row['student']['success']:4.0%}  "
        f"accepted {row['teacher']['acceptance']:4.0%}  "
        f"{seconds:.0f} s, {about(meter.left())} left"
    )
    if row["promotion"]:
        print(PROMOTION.format(**row["promotion"]))


def print_example(policy: Policy, state: State, config: Config) -> None:
    """The teacher's last problem and the baseline student's greedy answer to it.

    "right" means equal to the teacher's answer, as in the student's reward; that may be wrong.
    """
    last = state.questions[-1]
    problem = Problem(last["question"], last["answer"])
    restore(policy.model, state.baseline)
    rollouts, rewards = solve(policy, [problem], 1, config)
    verdict = "right" if rewards[0] == RIGHT else "wrong"
    lines = f"""\
teacher: {problem.question.strip()}
answer:  {problem.answer.strip()}
student: {rollouts[0].text.strip()}   ({verdict} by this answer)"""
    print(textwrap.indent(lines, "    "))


# -- The report, at the end.

KS = (1, 4, 8, 16, 32)  # of pass@k (paper)


def report(
    policy: Policy,
    hard_train: list[Problem],
    hard_test: list[Problem],
    state: State,
    config: Config,
) -> None:
    """Prints the closing tables and curves, and what to type next; writes report.json.

    eval.py reads the file: it refuses a split of the hard set, or weights, that are not the run's.
    """
    students = report_students(policy, hard_test, state, config)
    topics = report_topics(policy, state, config) if config.dataset == "tiny" else {}
    print_curves(state.log)
    write_json(
        Path(config.out) / "report.json",
        {
            "students": students,
            "topics": topics,
            "steps": len(state.log),
            "promotions": state.promotions,
            "promotion_questions": len(state.promotion_questions),
            "hard_set": fingerprint(hard_train, hard_test),
            "weights": {"teacher": weights_key(state.teacher), "student": state.student_key},
        },
    )
    questions = len(state.promotion_questions)
    print(f"\n{state.promotions} promotion(s), {questions} promotion questions; see {config.out}/")
    if not state.promotions:
        print("No student was promoted: the best student is still the base model.")
    print_next_commands(config)


def report_students(policy: Policy, hard_test: list[Problem], state: State, config: Config) -> dict:
    """Prints how good the base model is, and the student that is kept -> {name: accuracies}."""
    restore(policy.model, policy.base)
    table = {"base model": measure(policy, hard_test, config)}
    if state.promotions:  # from the run folder: the table is about what was saved
        kept = load_model(f"{config.out}/student", config)[0]
        restore(policy.model, snapshot(kept))
        table["promoted student"] = measure(policy, hard_test, config)
    print(f"""
On the {len(hard_test)} held-out hard problems (never trained on, never a reward);
pass@k is the chance that at least one of k sampled answers is right:""")
    print_table(table)
    return table


def report_topics(policy: Policy, state: State, config: Config) -> dict:
    """Of the tiny world's teacher: prints what it writes about -> {when: shares of the topics}."""
    table = {}
    # Of 400 problems a share of one half has a standard error of 2.5 points.
    for when, weights in (("at the start", policy.base), ("at the end", state.teacher)):
        restore(policy.model, weights)
        generator = seeded(config.seed, "report topics")  # the same randomness for both
        table[when] = topic_shares(propose(policy, 400, config, generator)[1])
    print("\nThe teacher's problems:")
    print_table(table)
    before, after = [shares["products"] for shares in table.values()]
    print(f"""
Only products teach the student something: sums it knows, ambiguous problems have no right answer.
The teacher was told nothing but the rewards. Its share of products went from {before:.0%} to \
{after:.0%}.""")
    return table


def measure(policy: Policy, problems: list[Problem], config: Config) -> dict:
    """Of the live model: {"greedy": accuracy, "pass@1": mean over the problems, ...}, as far as
    --eval-samples allows. The same random numbers for all models: less noise in a difference.
    """
    n = config.eval_samples
    right = right_counts(policy, problems, n, config, seeded(config.seed, "report"))
    accuracies = {"greedy": greedy_right(policy, problems, config).mean().item()}
    for k in KS:
        if k <= n:
            accuracies[f"pass@{k}"] = float(np.mean([pass_at_k(n, c, k) for c in right]))
    return accuracies


def right_counts(
    policy: Policy, problems: list[Problem], n: int, config: Config, generator: torch.Generator
) -> list[int]:
    """How many of n attempts of the live model are right, for each problem."""
    rewards = solve(policy, problems, n, config, generator)[1]  # [len(problems) * n]
    return (rewards == RIGHT).view(-1, n).sum(1).tolist()


def print_table(table: dict) -> None:
    """Prints {row: {column: share}} in percent; all rows have the same columns."""
    columns = next(iter(table.values()))
    print(" " * 18 + "".join(f"{column:>12}" for column in columns))
    for name, row in table.items():
        print(f"{name:18}" + "".join(f"{value:12.1%}" for value in row.values()))


def print_curves(log: list[dict]) -> None:
    """The teacher's reward, step by step and, in the tiny world, its share of products.

    What to look for: the reward rises, and falls after a promotion, since the new baseline is
    better. A line of one height says that nothing was learnt, or that it was all noise.
    """
    letters = "▁▂▃▄▅▆▇█"
    try:
        letters.encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:  # a console that lacks them
        letters = "_.-=+*%#"
    rewards = [row["reward"] for row in log]
    low = min(0.0, *rewards)
    high = max(0.01, *rewards)
    curve = bars(rewards, low, high, letters)
    marks = "".join("^" if row["promotion"] else " " for row in log)
    print(f"""
reward    {curve}   from {low:+.2f} to {high:+.2f}, one letter a step
          {marks}   ^ promotion""")
    if "topics" in log[0]:  # of the tiny world only
        shares = [row["topics"]["products"] for row in log]
        curve = bars(shares, 0.0, 1.0, letters)
        print(f"products  {curve}   from 0 to 100 % of the teacher's problems")


def bars(values: list[float], low: float, high: float, letters: str) -> str:
    """A curve in one line: each value becomes one of the letters, the first for low.

    >>> bars([0.0, 0.5, 1.0], 0.0, 1.0, "_-^")
    '_-^'
    """
    top = len(letters) - 1
    return "".join(letters[round((value - low) / (high - low) * top)] for value in values)


def print_next_commands(config: Config) -> None:
    """What to type next: it compares this run with what it must be compared with.

    In the tiny world that is also a run whose teacher is paid for learnability.
    """
    print("\nNext, to see what else trains a student, and how well:")
    folders = shlex.quote(config.out)
    if config.dataset == "tiny" and config.reward == "grounded" and config.promotion:
        other = shlex.quote(f"{config.out}-learnability")
        seeds = f"--seed {config.seed} --data-seed {config.data_seed}"
        print(f"  python soar.py {seeds} --reward learnability --out {other}")
        folders += f" {other}"
    print(f"  python eval.py {folders}")


def prepare_screen() -> None:
    """Each line is seen at once, also by `soar.py | tee`, and no letter ends a run: a console that
    lacks it (cp1252 on Windows) shows a question mark."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace", line_buffering=True)


def quiet_libraries() -> None:
    """Keeps warnings and progress bars of the hub and transformers off the screen."""
    import transformers  # late: --help and most mistakes need not wait for it

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
