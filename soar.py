#!/usr/bin/env python3
"""SOAR: a model that teaches itself, in one file.

A language model is stuck on problems that it failed 128 times of 128: no success, no reward, no gradient. SOAR ("Teaching
Models to Teach Themselves", arXiv 2601.18778) makes two copies of it. The teacher writes practice problems, the student
trains on them, and the teacher is paid by how much better the student then does on the hard problems, which it never sees.

    theta, phi <- base model                                # student baseline, teacher
    repeat T times:
    1.  the teacher phi writes g datasets X_1..X_g of n problems with answers
    2.  for each X_k, r times: a copy of theta takes a few RL steps on X_k;
            R_kj = its greedy accuracy on M hard problems - the accuracy of theta on the same ones;   R_k = mean over j
    3.  if the moving average of mean_k R_k exceeds tau:    # promotion
            theta <- the median student of the best dataset;   D_best <- D_best + that dataset
    4.  RLOO: phi is moved towards the datasets whose R_k is above that of the others
    return D_best, theta

What to type (times and memory: README.md):
    python soar.py                                   all of it on a built-in tiny world, on a laptop, in minutes
    python soar.py --dataset math                    real problems from the hub, sized for one GPU with 16-24 GB
    python soar.py --dataset math --preset paper     Table 3 of the paper: weeks on one GPU
    python soar.py --dataset FILE.jsonl --model DIR  your problems (fields problem and answer), your model
    torchrun --nproc_per_node=8 -- soar.py ...       the same on 8 GPUs, which share the students, the samples and the update
    python soar.py --help                            every knob, its default and where the default comes from

Simplified from the paper: one live model a process, in which teacher and students take turns; one update a batch, so exactly
on-policy, with no importance ratio and no clipping of it.

Contents: 1 Config, 3 Problems, 4 The tiny world, 5 Policy, 6 Sampler, 7 The hard set, 8 Optimizer, 9 RLOO, 10 The tiny
world's base model, 11 Inner loop, 12 Teacher, 13 Reward and promotion, 2 Verifier, 14 The run folder, 15 Outer loop, 16 Main.
Read from the top; in a hurry, read 9, 11, 12, 13 and 15, which are SOAR. The others are what makes it run.
"""
from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import datetime
import hashlib
import inspect
import json
import logging
import math
import os
import random
import re
import shlex
import shutil
import sys
import textwrap
import time
import unicodedata
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from functools import lru_cache
from itertools import islice
from operator import add, mul
from pathlib import Path

import mpmath  # comes with torch's sympy
import numpy as np
import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

class UserError(Exception):
    """Something the user can mend: main() prints its one sentence and exits with code 2."""


# ======== 1. Config: which knobs are there, and what did the paper set them to? =======================================

@dataclass
class Config:
    # --- The run
    dataset: str = "tiny"  # tiny, math, harp, olympiad, or a FILE.jsonl with problem/answer (or question/answer) fields
    preset: str = "auto"  # tiny, gpu (one 16-24 GB card), paper (Table 3), smoke (minutes on a CPU); auto: tiny or gpu
    model: str = "unsloth/Llama-3.2-3B-Instruct"  # hub id or local folder (this one: the ungated copy of the paper's)
    seed: int = 0  # every random choice of the run
    data_seed: int = 0  # the tiny world, the fail@k samples and the train/test split: shared by runs that are compared
    out: str = ""  # the run folder; empty: runs/DATASET-SEED
    cache: str = "runs/cache"  # where the tiny world's base model and the filtered hard sets are kept
    resume: bool = False  # continue the run in --out (give the same flags again)
    threads: int = 0  # torch's CPU threads; 0: as torch chooses (two threads on a busy core can be slower than one)
    device: str = "auto"  # auto: cuda if there is one, else cpu
    # --- The hard set
    k: int = 128  # keep the problems that the base model fails k times of k (paper: 128)
    pool: int = 0  # look only at this many problems, drawn by --data-seed; 0: all
    # --- Prompts
    teacher_prompt: str = ""  # FILE that replaces the built-in teacher prompt
    student_prompt: str = ""  # FILE that replaces the built-in student prompt; must contain {problem}
    chat: bool = False  # wrap both prompts in the model's chat template (the paper is silent)
    # --- Sampling
    temperature: float = 1.0  # of every sampled token (Table 3)
    teacher_tokens: int = 512  # new tokens at most for a proposal (Table 3)
    student_tokens: int = 1024  # new tokens at most for a solution (Table 3)
    # --- The teacher
    steps: int = 200  # T, outer steps (Table 3)
    datasets: int = 4  # g, datasets in one RLOO group (Table 3)
    groups: int = 1  # RLOO groups an outer step (Algorithm 1 shows one; Table 3's "batch size 2" reads as two)
    n: int = 64  # problems in a dataset (Table 3; swept over 8, 16, 32, 64)
    teacher_lr: float = 1e-5  # peak, cosine decay over --steps (Table 3)
    teacher_warmup: int = 20  # outer steps of linear warm-up (Table 3)
    # --- The student
    inner_steps: int = 10  # RLOO steps of the inner loop (Table 3)
    inner_extra: int = 5  # steps more after each promotion (Table 3)
    batch: int = 8  # problems a step (Table 3)
    group: int = 32  # completions a problem, the RLOO group (Table 3)
    student_lr: float = 1e-5  # peak, cosine decay over the inner loop (Table 3; it is silent on where the cosine ends)
    student_warmup: int = 0  # steps of linear warm-up (Table 3)
    # --- Both updates
    kl: float = 0.001  # coefficient of KL(policy, base model) (Table 3; which reference the students have it does not say)
    weight_decay: float = 0.0  # of AdamW (the paper is silent)
    clip: float = 1.0  # largest gradient norm; 0: no clipping (the paper is silent)
    # --- Reward and promotion
    reward: str = "grounded"  # grounded = measured progress; learnability = the Intrinsic-T baseline
    repeats: int = 4  # r, students a dataset (Table 3)
    reward_questions: int = 64  # M, hard train problems in Q_R (Table 3)
    tau: float = 0.01  # promote when the moving average of the rewards exceeds this (Table 3)
    window: int = 3  # outer steps in the moving average (Table 3)
    promotion: bool = True  # --no-promotion keeps the student at the base model
    # --- Memory and report
    sample_rows: int = 256  # completions sampled side by side: the KV cache's memory
    micro_tokens: int = 16384  # padded tokens in one backward pass: the activations' memory
    checkpointing: bool = False  # recompute activations in the backward pass: less memory, about a third slower
    eval_samples: int = 32  # completions a problem behind pass@k in the final table (paper: 32)

# Only what differs from the defaults above, which are the paper's.
PRESETS = {
    "paper": {"groups": 2},
    "gpu": {"model": "Qwen/Qwen2.5-0.5B-Instruct", "steps": 30, "n": 16, "repeats": 2, "group": 16, "student_tokens": 512,
            "teacher_tokens": 256, "teacher_warmup": 3, "pool": 1000, "checkpointing": True},
    "tiny": {"model": "tiny", "pool": 256, "temperature": 0.7, "steps": 12, "teacher_tokens": 40, "student_tokens": 24, "n": 32,
             "repeats": 2, "inner_steps": 20, "inner_extra": 0, "batch": 16, "group": 16, "student_lr": 7e-4,
             "teacher_lr": 5e-4, "teacher_warmup": 0, "sample_rows": 1024, "micro_tokens": 1024, "threads": 1},
    "smoke": {"steps": 1, "n": 2, "datasets": 2, "repeats": 1, "inner_steps": 1, "batch": 2, "group": 4, "student_tokens": 48,
              "teacher_tokens": 96, "k": 2, "pool": 16, "reward_questions": 4, "eval_samples": 2, "sample_rows": 16,
              "micro_tokens": 2048},
}
LEAST = dict.fromkeys("steps n k groups batch inner_steps repeats reward_questions window sample_rows micro_tokens eval_samples "
                      "teacher_tokens student_tokens".split(), 1)  # the least value of a flag; of other numbers it is 0, but:
LEAST |= {"temperature": 0.01, "datasets": 2, "group": 2, "seed": -math.inf, "data_seed": -math.inf, "tau": -math.inf}

def config_help(settings: type) -> dict[str, dict[str, str]]:
    """{section: {field: comment}}, read from a dataclass's source, so that a comment and its --help never differ."""
    sections, current = {}, None
    for line in inspect.getsource(settings).splitlines():
        if title := re.match(r"\s+# --- (.*)", line):
            current = sections.setdefault(title[1], {})
        elif entry := re.match(r"\s+(\w+): \w+ = .*?  # (.*)", line):
            current[entry[1]] = entry[2]
    return sections

def flag(name: str) -> str:
    return "--" + name.replace("_", "-")

def parse_flags(parser: argparse.ArgumentParser, settings: type, argv: list[str]) -> dict:
    """The flags that were given, {field: value}: every field of the dataclass is a flag. Raises UserError."""
    def fail(message):
        raise UserError(f"{message}; --help shows all flags")
    parser.error = fail
    for title, entries in config_help(settings).items():
        section = parser.add_argument_group(title)
        for name, comment in entries.items():
            default = getattr(settings, name)
            kind = {"action": argparse.BooleanOptionalAction} if isinstance(default, bool) else {"type": type(default)}
            section.add_argument(flag(name), default=argparse.SUPPRESS, help=f"{comment} [{default}]".replace("%", "%%"), **kind)
    return vars(parser.parse_args(argv))

def parse_config(argv: list[str]) -> Config:
    """Command line -> Config. Flags win over the preset, the preset over the defaults. Raises UserError on bad values."""
    presets = "\n".join(textwrap.fill(f"  {name:6}" + " ".join(f"{k}={v}" for k, v in preset.items()), 100,
                                      subsequent_indent=" " * 8) for name, preset in PRESETS.items())
    flags = parse_flags(argparse.ArgumentParser(
        usage="python soar.py [--dataset NAME] [--preset NAME] [flags]", allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=f"SOAR: a teacher that is paid by its student's progress.\nDefaults (in brackets) are the paper's; presets "
                    f"change only what they name:\n{presets}"), Config, argv)
    preset = flags.get("preset", "auto")
    if preset == "auto":
        preset = "tiny" if flags.get("dataset", "tiny") == "tiny" else "gpu"
    if preset not in PRESETS:
        raise UserError(f"--preset {preset} does not exist; choose one of {', '.join(PRESETS)}")
    config = Config(**PRESETS[preset] | flags | {"preset": preset})
    config.out = config.out or f"runs/{Path(config.dataset).stem}-{config.seed}"
    for name, value in vars(config).items():
        least = LEAST.get(name, 0)
        if isinstance(value, (int, float)) and not least <= value < math.inf:  # so NaN is refused, too
            raise UserError(f"{flag(name)} must be a finite number" + f", at least {least}" * (least >= 0))
    if config.reward not in ("grounded", "learnability"):
        raise UserError("--reward must be one of grounded, learnability")
    if (config.dataset == "tiny") != (config.model == "tiny"):
        raise UserError("the tiny data set and the tiny model belong together: give both or neither of them")
    return config

def fingerprint(*key) -> str:
    """Sixteen hex digits that name `key` (anything with a stable repr): file names of caches, seeds of generators."""
    return hashlib.sha256(repr(key).encode()).hexdigest()[:16]

def seeded(*key, device="cpu") -> torch.Generator:
    """A random generator that is a function of `key` alone, for instance (seed, "student", step, dataset, repeat).

    No generator lives longer than the job it is named for. So a resumed run needs no saved random state, and a student's
    luck does not depend on how many others were trained before it.
    """
    return torch.Generator(device).manual_seed(int(fingerprint(*key), 16) >> 1)


# ======== 3. Problems: where do the real ones come from? ==============================================================

@dataclass(frozen=True)
class Problem:
    question: str
    answer: str  # LaTeX, without \boxed{} and without $

def read_text(path: str, what: str) -> str:
    """The text of a file that the user has named. Raises UserError."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path} ({error}); {what}") from None

def read_jsonl(path: str) -> list[Problem]:
    """One JSON object a line, fields `problem` (or `question`) and `answer`. Raises UserError that names the bad line."""
    problems, text = [], read_text(path, "--dataset takes tiny, math, harp, olympiad or a JSONL file in UTF-8")
    for number, line in enumerate(text.split("\n"), start=1):  # splitlines() would cut at U+2028 inside a string
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            question, answer = row.get("problem", row.get("question")), row["answer"]
            problems.append(Problem(question.strip(), (str(answer) if type(answer) in (int, float) else answer).strip()))
        except (ValueError, KeyError, AttributeError):
            raise UserError(f"{path}, line {number}: needs a JSON object with the fields problem (or question) and answer, "
                            "both of them text") from None
        if not problems[-1].question or not problems[-1].answer:
            raise UserError(f"{path}, line {number}: its problem or its answer is empty")
    if not problems:
        raise UserError(f"{path} holds no problems")
    return problems

HUB = {  # name: (arguments of load_dataset, how a row becomes question and answer)
    # MATH's TEST split: models have memorised part of the train split (paper, section 4).
    "math": ({"path": "DigitalLearningGmbH/MATH-lighteval", "split": "test"},
             lambda row: (row["problem"], extract_boxed(row["solution"]))),
    "harp": ({"path": "json", "data_files": "https://github.com/aadityasingh/HARP/raw/main/HARP.jsonl.zip", "split": "train"},
             lambda row: (row["problem"], row["answer"])),
    "olympiad": ({"path": "Hothan/OlympiadBench", "name": "OE_TO_maths_en_COMP", "split": "train"},
                 lambda row: (row["question"], row["final_answer"][0])),
}

def load_problems(dataset: str) -> list[Problem]:
    """The pool of a real data set. Raises UserError when the file is bad or the hub cannot be reached."""
    if dataset not in HUB:
        return read_jsonl(dataset)
    source, pair = HUB[dataset]
    try:
        from datasets import load_dataset  # only here: a run on a file needs no hub library
        pairs = [pair(row) for row in load_dataset(**source)]
    except Exception as error:  # the hub's libraries raise dozens of kinds
        raise UserError(f"cannot load {dataset} from the hub ({type(error).__name__}); "
                        "check the network, or give a local file with --dataset FILE.jsonl") from None
    # Dollar signs that open and close mathematics go, `\\$` for money stays.
    return [Problem(question, re.sub(r"(?<!\\)\$", "", answer)) for question, answer in pairs if answer]


# ======== 4. The tiny world: what is the smallest world in which all this happens? ====================================

# A language model has read two kinds of text. Forum posts, where people solve worksheets and share the same misconceptions:
# "everybody knows" that 7*8 is 54. Textbooks, where exercises come with answer keys that are mostly right. So the model solves
# like the crowd and writes exercises like a textbook: it knows more than it shows, as SOAR assumes of a real model.
#
#     User: a= 7*8 ,b= 4+5 Assistant: \boxed{ a= 54 ,b= 9 }                                        a forum post
#     Teacher: <question> a= 7*8 </question> <answer> \boxed{ a= 56 } </answer>                    a textbook exercise
#
# A hard problem is a sheet of five products that the crowd has all wrong. The longer a sheet, the less people think: one
# product is right in 20 % of the posts, each of five in 4 %. Sampled at --temperature 0.7 that is 12 % and 1 %, all five once
# in 10^9 to 10^10 times: the 500,000 or so attempts of a whole run do not see it. Short sheets do get rewards, and what is
# learnt there carries over, because it is one switch for all facts: from the crowd's voice to the textbook's.
#
# (Why not at temperature 1? So small a model ends one completion in some thousand before the box is closed: reward 0 among
# tens. AdamW makes a full-sized step of this tiny gradient, and some two dozen such steps, in no particular direction, were
# enough for a first right answer in one to three worlds of six, from which Hard-Only escaped. At 0.7 they hardly ever occur.)
#
# A textbook chapter is on products, on sums (which the student knows: nothing to learn), or ambiguous: `x*8` with a key for
# some x (no way to learn). It is the teacher's business to find out which of them help.

FORUM_RIGHT, KEY_RIGHT = 0.2, 0.95  # chance that a misconceived product is right: in a post (/ items), in a textbook's key
LABELS = ("a=", ",b=", ",c=", ",d=", ",e=")  # one label an item: without them a small model cannot align answers
TOPICS = ("products", "sums", "ambiguous")
# Forum items by topic. The ambiguous ones make solvers guess: right one time in six or so, an easy 5/6 for a teacher who is
# paid for "neither always nor never right". (Without them the learnability teacher lost its diversity, but not its topics.)
FORUM_TOPICS = (0.7, 0.15, 0.15)
# Half of a textbook is on products: with equal shares fewer worlds saw a promotion.
CHAPTERS = ("products", "products", "sums", "ambiguous")

def make_world(seed: int) -> dict[tuple[int, int], int]:
    """The crowd's misconceptions {(a, b): a wrong product}: four fifths of the products of 4..9, off by a factor, one or ten."""
    rng, world = random.Random(f"world {seed}"), {}
    facts = [(x, y) for x in range(4, 10) for y in range(x, 10)]  # 21
    for x, y in rng.sample(facts, round(0.8 * len(facts))):
        misses = {x * y + d for d in (x, -x, y, -y, 1, -1, 10, -10)} - {x * y}
        world[x, y] = rng.choice(sorted(misses))
    return world

def product(world, x: int, y: int, right: bool) -> int:
    return x * y if right else world.get((min(x, y), max(x, y)), x * y)

def worksheet(parts: list) -> str:
    """Labelled items, questions and answers alike.

    >>> worksheet(["7*8", "4+5"]), worksheet([56, 9])
    ('a= 7*8 ,b= 4+5', 'a= 56 ,b= 9')
    """
    return " ".join(f"{label} {part}" for label, part in zip(LABELS, parts))

def random_item(rng: random.Random, topic: str) -> tuple[str, int, int]:
    """(text, x, y) with x and y in 4..9."""
    x, y = rng.randint(4, 9), rng.randint(4, 9)
    return {"products": f"{x}*{y}", "sums": f"{x}+{y}", "ambiguous": f"x*{y}"}[topic], x, y

def forum_post(world, rng: random.Random) -> tuple[str, str]:
    """(worksheet, solution): the crowd's misconceptions are nearly always repeated; asked for `x*8`, people guess an x."""
    questions, answers = [], []
    length = rng.randint(1, 5)
    for _ in range(length):
        topic = rng.choices(TOPICS, FORUM_TOPICS)[0]
        item, x, y = random_item(rng, topic)
        right = topic == "ambiguous" or rng.random() < FORUM_RIGHT / length
        questions.append(item)
        answers.append(x + y if topic == "sums" else product(world, x, y, right))
    return worksheet(questions), worksheet(answers)

def textbook_exercise(world, rng: random.Random) -> tuple[str, str]:
    """(worksheet, answer key), on one topic."""
    topic = rng.choice(CHAPTERS)
    questions, answers = [], []
    for _ in range(rng.randint(1, 5)):
        item, x, y = random_item(rng, topic)
        questions.append(item)
        answers.append(x + y if topic == "sums" else product(world, x, y, rng.random() < KEY_RIGHT))
    return worksheet(questions), worksheet(answers)

def hard_worksheets(world, count: int, seed: int) -> list[Problem]:
    """`count` different sheets of five different products that the crowd has all wrong."""
    rng, facts = random.Random(f"hard {seed}"), sorted(world)
    problems = {}
    while len(problems) < count:
        pairs = [rng.choice((pair, pair[::-1])) for pair in rng.sample(facts, 5)]
        sheet = worksheet([f"{x}*{y}" for x, y in pairs])
        problems[sheet] = Problem(sheet, worksheet([x * y for x, y in pairs]))
    return list(problems.values())

def topic_of(question: str) -> str:
    """products, sums, ambiguous (it has an unknown x) or other (mixed, or no worksheet at all)."""
    if not re.fullmatch(r"a= [\dx][*+]\d( ,[b-e]= [\dx][*+]\d)*", question):
        return "other"
    if "x" in question:
        return "ambiguous"
    return "products" if "+" not in question else "sums" if "*" not in question else "other"

def topic_shares(problems: list[Problem]) -> dict[str, float]:
    counts = Counter(topic_of(problem.question) for problem in problems)
    return {topic: counts[topic] / len(problems) for topic in (*TOPICS, "other")}


# ======== 5. Policy: what is it that plays the teacher and the students? ==============================================
# One letter a dimension, from here to the end: B sequences, G completions of one prompt (an RLOO group), T tokens,
# D hidden size, V vocabulary.

STUDENT_PROMPT = """User: {problem}
Think step by step, and end with the final answer inside \\boxed{}.

Assistant:"""
# The teacher never sees a hard problem, and no examples either: shown some, it copies them (paper, appendix).
TEACHER_PROMPT = """You write practice problems for a mathematics assistant that wants to improve.

Invent exactly one new problem, from one of these subjects: Algebra, Counting and Probability, Geometry, Intermediate
Algebra, Number Theory, Prealgebra, Precalculus. It must be original and challenging: a solution takes at least two or
three steps. Then solve it yourself. Give the result in exactly this form, with all other text outside of the tags:

<question>the problem</question><answer>\\boxed{the final answer}</answer>

"""
TINY_TEACHER_PROMPT, TINY_STUDENT_PROMPT = "Teacher:", "User: {problem} Assistant:"

RANK, RANKS = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # torchrun's: which process of how many

class Meter:
    """A stopwatch: meter("sampling") says what is going on from now on. Seconds by phase, tokens by kind."""

    def __init__(self):
        self.seconds, self.tokens, self.phase, self.since = Counter(), Counter(), "loading", time.perf_counter()

    def __call__(self, phase: str) -> None:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()  # or the next phase would be charged with what this one has only launched
        now = time.perf_counter()
        self.seconds[self.phase] += now - self.since
        self.phase, self.since = phase, now  # after an error main() reads here what was going on

@dataclass
class Policy:
    """ONE live model, in which the teacher and the students take turns, and what is needed to talk to it."""
    model: torch.nn.Module
    reference: torch.nn.Module | None  # the frozen base model, for the KL term
    tokenizer: object
    teacher_text: str
    student_text: str  # contains {problem}
    chat: bool
    base: list[torch.Tensor]  # the weights that the run starts from, in host memory
    meter: Meter
    alone: bool = RANKS == 1  # whether what runs now is one process's own job, in which it must not wait for the others

    def encode(self, text: str) -> list[int]:
        if not self.chat:
            return self.tokenizer(text).input_ids  # with BOS where the tokenizer has one
        turn = [{"role": "user", "content": text}]
        text = self.tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        return self.tokenizer(text, add_special_tokens=False).input_ids  # the template has written BOS already

    def teacher_prompt(self) -> list[int]:
        return self.encode(self.teacher_text)

    def student_prompt(self, problem: Problem) -> list[int]:
        return self.encode(self.student_text.replace("{problem}", problem.question))  # no format(): LaTeX is full of {}

def read_prompt(path: str, builtin: str, must_contain: str = "") -> str:
    """The text of a prompt file, or the built-in prompt where no file is given. Raises UserError."""
    text = read_text(path, "it should hold a prompt in UTF-8") if path else builtin
    if not text.strip() or must_contain not in text:
        raise UserError(f"the prompt file {path} must contain {must_contain or 'some text'}")
    return text

def load_model(path: str, config: Config) -> tuple:
    """(model, tokenizer) from the hub or a folder, in eval mode: bfloat16 on a GPU, float32 on a CPU (where bfloat16 is slow).

    Raises UserError when there is no such model, it is gated, or the network or the device is missing.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer
    device = ("cuda" if torch.cuda.is_available() else "cpu") if config.device == "auto" else config.device
    try:
        torch.empty(1, device=device)
        tokenizer = AutoTokenizer.from_pretrained(path)
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32 if device == "cpu" else torch.bfloat16)
        model = model.to(device).eval()
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:  # missing, gated, offline, truncated: transformers raises all kinds
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"the model {path} cannot be loaded with --device {device} ({reason}); give a complete local folder, or "
                        "a hub id (needs the network once and, if the model is gated, a login)") from None
    assert getattr(model.config, "attention_dropout", 0.0) == 0.0  # else training would not be on-policy
    ends = model.generation_config
    ends.eos_token_id = ends.eos_token_id or tokenizer.eos_token_id
    if ends.eos_token_id is None:
        raise UserError(f"the model {path} has no end-of-sequence token, so its completions never end; take another")
    return model, tokenizer

def snapshot(model) -> list[torch.Tensor]:
    """A copy of all weights in host memory. Tied weights (embedding and output layer) appear once."""
    return [p.detach().to("cpu", copy=True) for p in model.parameters()]

@torch.no_grad()
def restore(model, weights: list[torch.Tensor]) -> None:
    """Copy a snapshot back IN PLACE: whoever holds the parameters (an optimizer, a captured graph) sees the new values."""
    for p, w in zip(model.parameters(), weights, strict=True):
        p.copy_(w)

def load_policy(path: str, config: Config, meter: Meter) -> Policy:
    model, tokenizer = load_model(path, config)
    if config.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    builtin = (TINY_TEACHER_PROMPT, TINY_STUDENT_PROMPT) if config.dataset == "tiny" else (TEACHER_PROMPT, STUDENT_PROMPT)
    return Policy(model, copy.deepcopy(model) if config.kl else None, tokenizer,
                  read_prompt(config.teacher_prompt, builtin[0]), read_prompt(config.student_prompt, builtin[1], "{problem}"),
                  config.chat, snapshot(model), meter)

# -- Many GPUs. `torchrun --nproc_per_node=N -- soar.py ...` starts N processes, one a GPU, which all run the same program.
# Students, samples and the teacher's gradient are shared out; the rest each computes for itself; process 0 writes and prints.

def join_processes(config: Config) -> None:
    if RANKS > 1 and not dist.is_initialized():
        cuda = torch.cuda.is_available() and config.device != "cpu"
        if cuda:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if cuda else "gloo", timeout=datetime.timedelta(days=1))  # students can take long
    if RANK:
        sys.stdout = open(os.devnull, "w")

def gather(value) -> list:
    """The value of every process, in all of them."""
    values = [value] * RANKS
    if RANKS > 1:
        dist.all_gather_object(values, value)
    return values

def broadcast(policy: Policy, weights: list | None, source: int) -> list:
    """The weights that process `source` has, in all of them."""
    if RANKS == 1:
        return weights
    restore(policy.model, weights or policy.base)
    for p in policy.model.parameters():
        dist.broadcast(p.data, source)
    return snapshot(policy.model)

def sum_gradients(model) -> None:
    """Of all processes, in all of them."""
    for p in model.parameters():
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        dist.all_reduce(p.grad)

def in_turn(policy: Policy, jobs: int, work):
    """work(0), ..., work(jobs - 1), each computed by one process and given to all. Within work() nothing is shared again.

    A result must depend on its number alone, and not on the work before it: then N processes come to the same as one.
    """
    if policy.alone:
        yield from map(work, range(jobs))
        return
    for first in range(0, jobs, RANKS):
        policy.alone = True
        mine = [work(first + RANK)] if first + RANK < jobs else []
        policy.alone = False
        yield from sum(gather(mine), [])

def by_process_0(function):
    """For what writes files."""
    return (lambda *args: None) if RANK else function


# ======== 6. Sampler: how are completions drawn, fast, and from exactly the policy that is trained? ===================

def eos_ids(model) -> set[int]:
    """A SET: instruct models end a turn with any of several tokens."""
    ids = model.generation_config.eos_token_id
    return set(ids) if isinstance(ids, (list, tuple)) else {ids}

def pick_tokens(logits, temperature: float, uniforms=None):
    """[B, V] logits, [B] uniforms u in [0, 1) -> [B] tokens: the inverse of the cumulative distribution at u. No u: greedy.

    No top-k and no top-p: under a truncated distribution the score function has not mean zero, and policy gradients are
    wrong. One uniform number a token, drawn beforehand, so that a row's tokens do not depend on the rows beside it.

    >>> logits = torch.tensor([[0.2, 0.5, 0.3]]).log()      # cumulative: 0.2, 0.7, 1
    >>> [pick_tokens(logits, 1.0, torch.tensor([u])).item() for u in (0.1, 0.3, 0.6, 0.8)]
    [0, 1, 1, 2]
    """
    if uniforms is None:
        return logits.argmax(-1)
    part, picked = 1 + (1 << 22) // logits.shape[1], []  # rows whose distributions exist at the same time: 16 MB
    for x, u in zip(logits.split(part), uniforms.split(part)):
        cdf = (x.float() / temperature).softmax(-1).cumsum(-1)  # [rows, V]
        target = u[:, None] * cdf[:, -1:]  # [rows, 1]; rounding may leave the last entry a little off 1
        picked.append(torch.searchsorted(cdf, target, right=True)[:, 0].clamp_(max=cdf.shape[1] - 1))
    return torch.cat(picked)

def row_cache(n: int, length: int):
    """A cache that is prefilled with P prompts, then holds n copies of each, up to `length` tokens long.

    transformers' own cache grows by torch.cat: for every new token it copies all the others. This one is allocated once.
    """
    from transformers.cache_utils import Cache, DynamicLayer

    class Layer(DynamicLayer):
        rows = used = 0  # how much of the two buffers [P*n, heads, length, head size] is in use

        def update(self, keys, values, *args, **kwargs):  # [rows, heads, new tokens, head size]; of the prefill: [P, ...]
            prefill, new = self.used == 0, slice(self.used, self.used + keys.shape[2])
            if prefill:
                self.rows, self.is_initialized = len(keys) * n, True
                self.keys, self.values = (x.new_empty(self.rows, x.shape[1], length, x.shape[3]) for x in (keys, values))
            for buffer, x in ((self.keys, keys), (self.values, values)):
                buffer[:self.rows, :, new] = x.repeat_interleave(n, 0) if prefill else x
            self.used = new.stop
            if prefill:  # the prompts look at themselves only
                return keys, values
            return self.keys[:self.rows, :, :self.used], self.values[:self.rows, :, :self.used]

        def get_seq_length(self):
            return self.used

        def keep(self, rows: int, holes, movers):
            """Only `rows` rows stay: the first ones, with the holes among them filled by the movers behind them."""
            self.rows = rows
            for buffer in (self.keys, self.values):
                buffer[holes, :, :self.used] = buffer[movers, :, :self.used]

    return Cache(layer_class_to_replicate=Layer)

def prefill(model, prompts: list[list[int]], n: int, max_new_tokens: int):
    """Run each of P prompts once -> (logits of the first new token [P*n, V], padding [P*n, 1], cache), n rows for each prompt.

    Prompts are padded on the LEFT, to the length T of the longest, so that all end in the same column. What counts is that
    no row sees its padding, and that its first real token has position 0:

        prompts a b c and d, T = 3:    a b c    padding 0    positions 0 1 2
                                       . . d    padding 2    positions . . 0
    """
    T, device = max(map(len, prompts)), model.device
    ids = torch.tensor([[0] * (T - len(prompt)) + prompt for prompt in prompts], device=device)  # [P, T]
    padding = torch.tensor([[T - len(prompt)] for prompt in prompts], device=device)  # [P, 1]
    column, cache = torch.arange(T, device=device), row_cache(n, T + max_new_tokens)
    logits = model(input_ids=ids, attention_mask=column >= padding, position_ids=(column - padding).clamp(min=0),
                   past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]  # [P, V]
    if not torch.isfinite(logits).all():
        raise UserError("the model's logits are NaN or infinite: its weights are damaged, or the learning rate was too high")
    return logits.repeat_interleave(n, 0), padding.repeat_interleave(n, 0), cache

@torch.inference_mode()
def generate(model, prompts: list[list[int]], n: int, max_new_tokens: int, temperature: float = 1.0, uniforms=None):
    """n completions of each of P prompts -> (tokens [P*n, max_new_tokens], zero-padded; lengths [P*n]), prompt by prompt.

    uniforms [P*n, max_new_tokens], in [0, 1), are all the luck that there is; without them decoding is greedy.

    A length counts the tokens up to and including EOS: ending is an action of the policy like any other, and gets its share
    of the gradient. Masks are made from lengths, never from `token != pad`, since in many models pad IS EOS.
    """
    assert not model.training, "in train mode with gradient checkpointing, transformers drops the KV cache: wrong tokens"
    device, B = model.device, len(prompts) * n
    eos = torch.tensor(sorted(eos_ids(model)), device=device)
    logits, padding, cache = prefill(model, prompts, n, max_new_tokens)
    padded = padding.any()  # without padding, attention needs no mask
    tokens = torch.zeros(B, max_new_tokens, dtype=torch.long, device=device)  # [B, max_new_tokens]
    lengths = torch.full((B,), max_new_tokens, device=device)  # [B]
    alive = torch.arange(B, device=device)  # [rows]: the output row of each row that is still in the batch
    for t in range(max_new_tokens):
        token = pick_tokens(logits, temperature, None if uniforms is None else uniforms[alive, t])  # [rows]
        tokens[alive, t] = token
        going = ~torch.isin(token, eos)  # [rows]
        rows = int(going.sum())
        if rows < len(alive):  # rows that ended leave; of 0 1 2 3 4, if 1 and 3 ended, 0 4 2 stay: 4 moves into the hole at 1
            lengths[alive[~going]] = t + 1
            holes, movers = (~going[:rows]).nonzero()[:, 0], rows + going[rows:].nonzero()[:, 0]
            for x in (alive, token, padding):
                x[holes] = x[movers]
            alive, token, padding = alive[:rows], token[:rows], padding[:rows]
            for layer in cache.layers:
                layer.keep(rows, holes, movers)
        if not rows or t + 1 == max_new_tokens:
            break
        column = torch.arange(cache.get_seq_length() + 1, device=device)
        logits = model(input_ids=token[:, None], attention_mask=column >= padding if padded else None,
                       position_ids=column[-1] - padding, past_key_values=cache, use_cache=True).logits[:, -1]  # [rows, V]
    return tokens, lengths

@dataclass
class Rollout:
    prompt: list[int]
    completion: list[int]  # the sampled ids, with EOS: never decoded and encoded again, which can give other tokens
    text: str  # of the completion, without EOS
    truncated: bool  # the limit came before EOS

def sample(policy: Policy, prompts: list[list[int]], n: int, max_new_tokens: int, config: Config, generator=None):
    """n rollouts of each prompt -> list of them, prompt by prompt; no generator: greedy. At most --sample-rows side by side."""
    B, eos = len(prompts) * n, eos_ids(policy.model)
    uniforms = None if generator is None else torch.rand(B, max_new_tokens, generator=generator)
    side_by_side = config.sample_rows if policy.alone else min(config.sample_rows, math.ceil(B / RANKS))
    # A part is some prompts with all n rows of each or, where n alone is too wide, one prompt with some of its rows.
    step, width = max(1, side_by_side // n), min(n, side_by_side)
    parts = [(prompts[i:i + step], i * n + j, min(n - j, width))  # (prompts, first of all their rows, rows of each)
             for i in range(0, len(prompts), step) for j in range(0, n, width)]

    def draw(number: int) -> list[Rollout]:
        chunk, first, width = parts[number]
        u = None if uniforms is None else uniforms[first:first + len(chunk) * width].to(policy.model.device)
        tokens, lengths = generate(policy.model, chunk, width, max_new_tokens, config.temperature, u)
        rows = [ids[:length] for ids, length in zip(tokens.tolist(), lengths.tolist())]
        ended = [ids[-1] in eos for ids in rows]
        texts = policy.tokenizer.batch_decode([ids[:len(ids) - end] for ids, end in zip(rows, ended)],
                                              clean_up_tokenization_spaces=False, skip_special_tokens=True)
        return [Rollout(chunk[i // width], ids, text, not end) for i, (ids, text, end) in enumerate(zip(rows, texts, ended))]

    policy.meter("sampling")
    rollouts = [rollout for part in in_turn(policy, len(parts), draw) for rollout in part]
    policy.meter.tokens["sampled"] += sum(len(rollout.completion) for rollout in rollouts)
    policy.meter("other")
    return rollouts

def solve(policy: Policy, problems: list[Problem], n: int, config: Config, generator=None):
    """n attempts at each problem by the live model -> (rollouts, float64 rewards [B]), B = len(problems) * n.

    Without a generator they are greedy (and n should be 1).
    """
    prompts = [policy.student_prompt(problem) for problem in problems]
    rollouts = sample(policy, prompts, n, config.student_tokens, config, generator)
    policy.meter("grading")
    rewards = [student_reward(rollout.text, problems[i // n].answer) for i, rollout in enumerate(rollouts)]
    policy.meter("other")
    return rollouts, torch.tensor(rewards, dtype=torch.float64)

def greedy_right(policy: Policy, problems: list[Problem], config: Config):
    """[len(problems)] float64: 1 where the live model's greedy answer is right. Greedy, because it has no sampling noise."""
    return (solve(policy, problems, 1, config)[1] == RIGHT).double()


# ======== 7. The hard set: which problems does the base model never solve? ============================================

def pass_at_k(n: int, c: int, k: int) -> float:
    """Chance that k of n samples, c of them right, contain a right one: 1 - C(n-c, k) / C(n, k), as a product.

    >>> pass_at_k(4, 1, 2)      # 6 pairs of 4 samples, 3 of them with the right one
    0.5
    """
    return 1.0 - math.prod((n - c - i) / (n - i) for i in range(k))

@by_process_0
def write_whole(path: Path, write) -> None:
    """write(path), all or nothing: a run that is killed while writing leaves the old file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    write(temporary)
    os.replace(temporary, path)

def write_json(path: Path, value) -> None:
    write_whole(path, lambda file: file.write_text(json.dumps(value, indent=1)))

@contextlib.contextmanager
def whole(path: Path, advice: str):
    """Whatever goes wrong while a file of ours is read means that it is damaged. Raises UserError."""
    try:
        yield
    except Exception:  # torch.load alone raises a dozen kinds
        raise UserError(f"{path} is damaged; {advice}") from None

def hard_problems(policy: Policy, pool: list[Problem], config: Config) -> list[Problem]:
    """fail@k: the problems of the pool that the live model fails k times of k (paper, section 4).

    A problem leaves at its first success: after up to 8, 32 or k samples, so the easy ones cost 8 and the set is the same. The
    state is written after every 32 problems, under a name made of all that the answer depends on (weights, prompt,
    problems, k and the sampling flags); an interrupted filter goes on, a finished one is read.
    """
    weights = [zlib.crc32(p.detach().cpu().contiguous().view(torch.uint8).numpy()) for p in policy.model.parameters()]
    key = fingerprint(weights, policy.student_text, policy.chat, config.k, config.temperature, config.student_tokens,
                      config.data_seed, pool)
    path, done, hard = Path(config.cache) / f"hard-{key}.json", 0, []
    if path.exists():
        with whole(path, "delete it and the filter starts again"):
            done, hard = json.loads(path.read_text()).values()
    limits = [0] + [limit for limit in (8, 32) if limit < config.k] + [config.k]
    for first in tqdm(range(done, len(pool), 32), desc=f"fail@{config.k} filter", disable=RANK > 0 or None, leave=False):
        alive = range(first, min(first + 32, len(pool)))
        for before, limit in zip(limits, limits[1:]):
            generator = seeded(config.data_seed, "filter", first, limit)
            rewards = solve(policy, [pool[i] for i in alive], limit - before, config, generator)[1]
            solved = (rewards.view(len(alive), -1) == RIGHT).any(1).tolist()
            alive = [i for i, success in zip(alive, solved) if not success]
        hard = hard + alive
        write_json(path, {"done": first + 32, "hard": hard})
    return [pool[i] for i in hard]

def split_hard(problems: list[Problem], config: Config) -> tuple[list[Problem], list[Problem]]:
    """50/50 at random into train (the teacher's reward) and test (the final table). Raises UserError when too few."""
    if len(problems) < 2:
        raise UserError(f"only {len(problems)} problem(s) of the pool were failed {config.k} times of {config.k}: too few to "
                        "split; take a larger --pool, a smaller --k, a weaker --model or harder problems")
    order = torch.randperm(len(problems), generator=seeded(config.data_seed, "split")).tolist()
    return [problems[i] for i in order[:len(order) // 2]], [problems[i] for i in order[len(order) // 2:]]


# ======== 8. Optimizer: how do steps of 1e-5 reach bfloat16 weights? ==================================================
# AdamW, all weights, float32 moments. bfloat16 has 8 significant bits: near 0.02 its values are 1e-4 apart, so a step of
# 1e-5 is rounded away five times of six, and SOAR measures the effect of ten such steps. Stochastic rounding moves
# the weight by a whole spacing with probability 1e-5 / 1e-4: right on average, at no extra memory (12 bytes a weight in all;
# float32 master weights would cost 16).

def stochastic_round(x, generator):
    """float32 -> bfloat16, up or down with probabilities that make the expectation exact.

    bfloat16 is the upper half of float32's bits. Add a random number to the lower half, carry included, then cut it off.

    >>> x = torch.full((80_000,), 1 + 1 / 1024)     # an eighth of the way from 1 to the next bfloat16, 1 + 1/128
    >>> y = stochastic_round(x, torch.Generator().manual_seed(0)).double()
    >>> y.unique().tolist(), round((y > 1).double().mean().item(), 2)
    ([1.0, 1.0078125], 0.12)
    """
    noise = torch.randint(0, 1 << 16, x.shape, dtype=torch.int32, device=x.device, generator=generator)
    return ((x.view(torch.int32) + noise) & -0x10000).view(torch.float32).to(torch.bfloat16)

def adamw_state(model) -> dict:
    """Moments of a fresh optimizer."""
    zeros = lambda: [torch.zeros_like(p, dtype=torch.float32) for p in model.parameters()]
    return {"t": 0, "m": zeros(), "v": zeros()}

@torch.no_grad()
def adamw_step(model, state: dict, lr: float, config: Config, generator=None, betas=(0.9, 0.999)) -> float:
    """One AdamW step on p.grad, which is cleared -> the gradient's norm before clipping. Raises UserError on NaN.

    m <- b1 m + (1 - b1) g;  v <- b2 v + (1 - b2) g^2;  p <- p (1 - lr wd) - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)
    """
    params, (b1, b2) = list(model.parameters()), betas
    norm = torch.stack([p.grad.float().norm() for p in params]).norm().item()
    if not math.isfinite(norm):
        raise UserError("the loss or its gradient became NaN or infinite; nothing was saved from this step: "
                        "lower --student-lr or --teacher-lr and start a new run")
    scale = min(1.0, config.clip / (norm + 1e-6)) if config.clip else 1.0
    state["t"] += 1
    correct1, correct2 = 1 - b1 ** state["t"], 1 - b2 ** state["t"]
    for p, m, v in zip(params, state["m"], state["v"], strict=True):
        g = p.grad.float() * scale
        m.lerp_(g, 1 - b1)
        v.mul_(b2).addcmul_(g, g, value=1 - b2)
        new = p.float() * (1 - lr * config.weight_decay) - lr * (m / correct1) / ((v / correct2).sqrt_() + 1e-8)
        p.copy_(stochastic_round(new, generator) if p.dtype == torch.bfloat16 else new)
        p.grad = None
    return norm

def learning_rate(peak: float, step: int, total: int, warmup: int) -> float:
    """Linear warm-up, then a cosine from `peak` at step `warmup` to 0 at `total` (steps count from 0).

    >>> [round(learning_rate(1.0, step, 4, 0), 2) for step in range(4)]
    [1.0, 0.85, 0.5, 0.15]
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, total - warmup))))


# ======== 9. RLOO: which way do rewards push the weights? =============================================================

def rloo_advantages(rewards, group_size: int):
    """REINFORCE leave-one-out: A_i = r_i - mean of the other rewards of its group; [B] -> [B], groups are consecutive.

    The others' mean does not depend on sample i, so it is a baseline that leaves the gradient unbiased. No division by the
    standard deviation. Advantages sum to zero over a group; where all rewards are equal they are zero.

    >>> rloo_advantages(torch.tensor([120., 0., 0., 10., 10., 10.]), 3).tolist()    # others' means: 0, 60, 60
    [120.0, -60.0, -60.0, 0.0, 0.0, 0.0]
    """
    groups = rewards.view(-1, group_size)  # [B/G, G]
    return (groups - (groups.sum(1, keepdim=True) - groups) / (group_size - 1)).flatten()

def completion_logprobs(model, rollouts: list[Rollout], temperature: float, rows: int = 512):
    """[B] float32: ln p(completion | prompt) of each rollout, at the temperature that it was sampled with.

    Full logits [B, T, V] never exist: with V = 128,000 they are the first thing that does not fit. Hidden states are reduced
    to the positions that predict a completion token, and these are projected `rows` at a time under checkpointing.
    """
    start = torch.tensor([[len(r.prompt)] for r in rollouts], device=model.device)  # [B, 1]
    end = torch.tensor([[len(r.prompt) + len(r.completion)] for r in rollouts], device=model.device)  # [B, 1]
    B, T = len(rollouts), int(end.max())
    # Padded on the RIGHT, where causal attention never looks: no mask is needed, and positions count from 0.
    ids = torch.tensor([(r.prompt + r.completion + [0] * T)[:T] for r in rollouts], device=model.device)  # [B, T]
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state  # [B, T, D]
    # Position t predicts token t + 1. Prompt a b, completion c EOS: start = 2, end = 4, and c and EOS are predicted by the
    # hidden states at 1 and 2, that is from start - 1 to end - 2. N tokens in all:
    column = torch.arange(T - 1, device=model.device)
    predicts = (start - 1 <= column) & (column < end - 1)  # [B, T - 1]
    hidden, targets = hidden[:, :-1][predicts], ids[:, 1:][predicts]  # [N, D], [N]
    head = model.get_output_embeddings()

    def project(h, y):  # [rows, D], [rows] -> [rows]; softmax in float32
        return (head(h).float() / temperature).log_softmax(-1).gather(-1, y[:, None])[:, 0]

    logprobs = torch.cat([checkpoint(project, hidden[i:i + rows], targets[i:i + rows], use_reentrant=False)
                          for i in range(0, len(targets), rows)])  # [N]
    row = predicts.nonzero()[:, 0]  # [N]: whose token it is
    return torch.zeros(B, device=model.device).index_add(0, row, logprobs)

def micro_batches(rollouts: list[Rollout], budget: int):
    """Index lists that fit in `budget` padded tokens each (one rollout always fits), similar lengths together."""
    length = lambda i: len(rollouts[i].prompt) + len(rollouts[i].completion)
    batch = []
    for i in sorted(range(len(rollouts)), key=length):
        if batch and (len(batch) + 1) * length(i) > budget:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch

def policy_update(policy: Policy, rollouts: list[Rollout], advantages, state: dict, lr: float, config: Config,
                  generator=None) -> dict:
    """One step up the gradient of  E[reward] - kl * KL(policy, reference),  for the teacher and the student alike.

    loss = -1/B sum_i w_i ln p_i,   w_i = A_i - kl * (ln p_i - ln ref_i), held constant;   ln p_i sums over tokens

    The minus makes a loss of it: where A_i > 0 a smaller loss is a larger ln p_i.

    One update a batch, so samples come from the policy that is updated: no importance ratio, no clipping. The KL term is the
    estimator k1 = ln p - ln ref put into the REWARD, whose gradient is that of the reverse KL (the same as k2 = k1^2 / 2 as
    a loss). k1 as a loss has gradient zero on average, since E[grad ln p] = 0; k3 as a loss gives the forward KL.

    B counts all rollouts, before anything is skipped or cut into micro-batches, so neither changes the gradient. Rollouts
    with advantage zero (groups whose rewards are all equal) skip both passes: nothing pulls them anywhere, so they pay no KL.
    """
    active, kls, B = advantages.nonzero()[:, 0].tolist(), [], len(rollouts)
    if not active:
        return {"grad_norm": 0.0, "kl": 0.0}
    rollouts, advantages = [rollouts[i] for i in active], advantages[active]
    policy.model.train(config.checkpointing)  # checkpointing works in train mode only; there is no dropout to turn on
    for number, part in enumerate(micro_batches(rollouts, config.micro_tokens)):
        if not policy.alone and number % RANKS != RANK:
            continue  # another process has it
        policy.meter("log-probs")
        batch = [rollouts[i] for i in part]
        logprobs = completion_logprobs(policy.model, batch, config.temperature)  # [b]
        weights = advantages[part].to(logprobs)  # [b]
        if config.kl:
            with torch.no_grad():
                k1 = logprobs - completion_logprobs(policy.reference, batch, config.temperature)  # [b]
            weights, kls = weights - config.kl * k1, kls + k1.tolist()
        policy.meter("backward")
        (-(weights * logprobs).sum() / B).backward()
        policy.meter.tokens["trained"] += sum(len(r.completion) for r in batch)
    policy.meter("optimizer")
    policy.model.eval()
    if not policy.alone:
        kls = sum(gather(kls), [])
        sum_gradients(policy.model)
    norm = adamw_step(policy.model, state, lr, config, generator)
    policy.meter("other")
    return {"grad_norm": norm, "kl": float(np.mean(kls or [0.0]))}


# ======== 10. The tiny world's base model: where does a model with latent knowledge come from? ========================

VOCABULARY = ["<pad>", "<eos>", "<unk>", "User:", "Assistant:", "Teacher:", "<question>", "</question>", "<answer>",
              "</answer>", "\\boxed{", "}", *LABELS, *map(str, range(100)),
              *(f"{x}{operator}{y}" for operator in "*+" for x in "456789x" for y in range(4, 10))]
# The initial weights matter most: with transformers' default of 0.02, made for wide models, learning took over twice as long.
PRETRAIN = {"steps": 500, "batch": 96, "lr": 5e-3, "betas": (0.9, 0.99), "init": 0.1, "forum": 0.65, "micro_tokens": 1024}

def tiny_tokenizer(folder: Path):
    """Whole words as tokens, as an ordinary tokenizer file."""
    from transformers import PreTrainedTokenizerFast
    file, vocabulary = folder / "tokenizer.json", {word: i for i, word in enumerate(VOCABULARY)}
    file.write_text(json.dumps({
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None, "post_processor": None,
        "decoder": None, "pre_tokenizer": {"type": "WhitespaceSplit"},
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<unk>"}}))
    return PreTrainedTokenizerFast(tokenizer_file=str(file), pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")

def tiny_document(world, rng: random.Random) -> tuple[str, str]:
    """(prompt, completion): a forum post or an exercise of a textbook."""
    if rng.random() < PRETRAIN["forum"]:
        question, answer = forum_post(world, rng)
        return TINY_STUDENT_PROMPT.replace("{problem}", question), f"\\boxed{{ {answer} }} <eos>"
    question, answer = textbook_exercise(world, rng)
    return TINY_TEACHER_PROMPT, f"<question> {question} </question> <answer> \\boxed{{ {answer} }} </answer> <eos>"

def pretrain(model, tokenizer, world, seed: int) -> None:
    """Next-token training on both kinds of text. No loss on prompts: the questions of forum posts are random numbers."""
    rng, state = random.Random(f"text {seed}"), adamw_state(model)
    for step in (bar := tqdm(range(PRETRAIN["steps"]), desc="pretraining the tiny base model", disable=None, leave=False)):
        prompts, completions = zip(*(tiny_document(world, rng) for _ in range(PRETRAIN["batch"])))
        batch = [Rollout(*ids, "", False) for ids in zip(tokenizer(prompts).input_ids, tokenizer(completions).input_ids)]
        tokens, total = sum(len(r.completion) for r in batch), 0.0
        for part in micro_batches(batch, PRETRAIN["micro_tokens"]):
            loss = -completion_logprobs(model, [batch[i] for i in part], 1.0).sum() / tokens
            loss.backward()
            total += loss.item()
        adamw_step(model, state, learning_rate(PRETRAIN["lr"], step, PRETRAIN["steps"], 20), Config(), betas=PRETRAIN["betas"])
        bar.set_postfix(loss=f"{total:.3f}", refresh=False)

def tiny_base_model(config: Config) -> str:
    """The folder of the tiny world's base model (Llama, 2 layers, about 93,000 weights), trained on the first call."""
    from transformers import LlamaConfig, LlamaForCausalLM
    source = map(inspect.getsource, (make_world, product, random_item, forum_post, textbook_exercise, pretrain, tiny_base_model))
    recipe = fingerprint(config.data_seed, FORUM_TOPICS, FORUM_RIGHT, KEY_RIGHT, CHAPTERS, VOCABULARY, PRETRAIN, *source)
    folder = Path(config.cache) / f"tiny-base-{recipe}"  # other constants or other code: another model
    if folder.exists():
        return str(folder)
    building = Path(f"{folder}.{os.getpid()}.tmp")  # renamed when complete, so a killed run leaves no half model behind
    building.mkdir(parents=True)
    tokenizer = tiny_tokenizer(building)
    with torch.random.fork_rng():
        torch.manual_seed(int(fingerprint(config.data_seed, "initial weights"), 16) >> 1)
        model = LlamaForCausalLM(LlamaConfig(
            vocab_size=len(VOCABULARY), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=4, max_position_embeddings=128, tie_word_embeddings=True, initializer_range=PRETRAIN["init"],
            pad_token_id=VOCABULARY.index("<pad>"), eos_token_id=VOCABULARY.index("<eos>"), bos_token_id=None))
    pretrain(model, tokenizer, make_world(config.data_seed), config.data_seed)
    model.save_pretrained(building)
    tokenizer.save_pretrained(building)
    with contextlib.suppress(OSError):  # another run came first, with the same model by construction
        building.rename(folder)
    shutil.rmtree(building, ignore_errors=True)
    return str(folder)


# ======== 11. Inner loop: what does a student do with a dataset? ======================================================

def epochs(dataset: list[Problem], steps: int, batch: int, generator) -> list[list[Problem]]:
    """`steps` batches: the dataset over and over, each time in a new order; a batch may span two epochs."""
    order = []
    while len(order) < steps * batch:
        order += torch.randperm(len(dataset), generator=generator).tolist()
    return [[dataset[i] for i in order[step * batch:(step + 1) * batch]] for step in range(steps)]

RIGHT = 120.0     # reward of a right answer (section 3 of the paper)
MAX_GUESSES = 10  # formulas outside the last box that can earn the partial reward

def student_reward(completion: str, gold: str) -> float:
    r"""The paper's reward: 120 for a right box; 20 for a wrong one if one of the last other formulas
    is right; 10 for any box; else 0.

    >>> student_reward(r"\boxed{7}", "7"), student_reward(r"$7$, so \boxed{8}", "7")
    (120.0, 20.0)
    >>> student_reward(r"\boxed{8}", "7"), student_reward("7", "7")
    (10.0, 0.0)
    """
    boxes = list(islice(_boxes(completion), 1 + MAX_GUESSES))
    if not boxes:
        return 0.0
    if answers_equal(boxes[0], gold):
        return RIGHT
    formulas = re.findall(r"\$([^$]{1,200})\$|\\\((.{1,200}?)\\\)", completion)
    guesses = [dollars or brackets for dollars, brackets in reversed(formulas)]
    guesses = (guesses + boxes[1:])[:MAX_GUESSES]
    return 20.0 if any(answers_equal(guess, gold) for guess in guesses) else 10.0

def train_student(policy: Policy, batches: list[list[Problem]], config: Config, key: tuple,
                  after_step=lambda step, figures: None, moments: dict | None = None, start: int = 0) -> list[dict]:
    """One RLOO step of RLVR on each batch, in place on the live model -> a dict of figures for each step.

    `key` names this student; all its luck is a function of it. The optimizer is fresh: its moments live as long as the student.
    (To go on with an interrupted student, restore its weights and give its moments and the step to start at.)
    """
    moments, log = moments or adamw_state(policy.model), []
    for step in range(start, len(batches)):
        rollouts, rewards = solve(policy, batches[step], config.group, config, seeded(*key, step))
        advantages = rloo_advantages(rewards, config.group)  # [B], B = batch * group
        lr = learning_rate(config.student_lr, step, len(batches), config.student_warmup)
        rounding = seeded(*key, step, "rounding", device=policy.model.device)
        figures = policy_update(policy, rollouts, advantages, moments, lr, config, rounding)
        log.append(figures | {
            "reward": rewards.mean().item(), "success": (rewards == RIGHT).double().mean().item(),
            "flat_groups": (advantages.view(-1, config.group) == 0).all(1).double().mean().item(),
            "truncated": float(np.mean([r.truncated for r in rollouts])),
            "length": float(np.mean([len(r.completion) for r in rollouts]))})
        after_step(step, log[-1])
    return log


# ======== 12. Teacher: how does a problem get accepted, and why is throwing the others away no bias? ==================

def parse_problem(text: str) -> Problem | None:
    """The problem in a teacher's completion, or None unless (paper, section 3) question and answer tags open and close, the
    answer has a box, and the verifier can read what is in it.

    >>> parse_problem(r"Sure! <question>What is 2+3?</question><answer>\\boxed{5}</answer>")
    Problem(question='What is 2+3?', answer='5')
    """
    found = re.search(r"<question>(.*?)</question>.*?<answer>(.*?)</answer>", text, re.DOTALL)
    if not found or not found[1].strip():
        return None
    boxed = extract_boxed(found[2])
    return Problem(found[1].strip(), boxed.strip()) if boxed is not None and parses(boxed) else None

def propose(policy: Policy, count: int, config: Config, generator) -> tuple[list[tuple[Rollout, Problem]], dict]:
    """Sample the live model as the teacher until `count` problems are accepted -> (accepted, figures). UserError if hopeless.

    Proposition 1: this rejection needs no correction. Sampling from pi_0 until the result is in the accepted set S draws from
    pi = pi_0 / pi_0(S) on S, so  ln pi = ln pi_0 - ln pi_0(S),  and the update of section 9, which uses ln pi_0, lacks the
    gradient of  ln pi_0(S).  That gradient is the same for every sample, so it is multiplied by the SUM of the advantages, and
    RLOO's advantages sum to zero in each group. (Plain REINFORCE, whose weights do not, would need the correction.)
    """
    prompt, accepted, tried, truncated = policy.teacher_prompt(), [], 0, 0
    opening = "<question>" if policy.teacher_text.rstrip().endswith("<question>") else ""  # a prompt may open the tag itself
    while len(accepted) < count:
        if tried >= 20 * count + 100:
            raise UserError(f"only {len(accepted)} of {tried} of the teacher's completions could be used, {truncated} were cut "
                            "off; try --chat, more --teacher-tokens, or a --teacher-prompt with examples; "
                            f"the last completion began: {rollouts[-1].text[:120]!r}")
        rollouts = sample(policy, [prompt], count - len(accepted), config.teacher_tokens, config, generator)
        tried, truncated = tried + len(rollouts), truncated + sum(r.truncated for r in rollouts)
        accepted += [(r, problem) for r in rollouts if (problem := parse_problem(opening + r.text))]
    return accepted, {"acceptance": len(accepted) / tried, "truncated": truncated / tried,
                      "length": float(np.mean([len(r.completion) for r, _ in accepted]))}


# ======== 13. Reward and promotion: what is the teacher paid for, and when does the student keep what it learnt? ======

@dataclass
class State:
    """All that passes from one outer step to the next; the checkpoint is this and nothing else."""
    teacher: list  # phi
    moments: dict  # of the teacher's AdamW
    baseline: list  # theta, the weights that every student starts from
    step: int = 0
    promotions: int = 0
    best_accuracy: float = -1.0  # of the promoted students, greedy, on the whole hard train set
    history: list[float] = field(default_factory=list)  # mean reward of each step since the last promotion
    log: list[dict] = field(default_factory=list)  # these three are the lines of the .jsonl files; a row an outer step
    questions: list[dict] = field(default_factory=list)  # every problem of the teacher
    promotion_questions: list[dict] = field(default_factory=list)  # D_best

def median_student(rewards: list[float]) -> int:
    """Index of the median; of the two middle ones the better, or with r = 2 the average student would always be the worse.

    >>> median_student([0.3, 0.1, 0.2]), median_student([0.4, 0.1, 0.3, 0.2])     # 0.2 and 0.3
    (2, 2)
    """
    return sorted(range(len(rewards)), key=rewards.__getitem__)[len(rewards) // 2]

def promotion_due(history: list[float], config: Config) -> bool:
    """Is the mean of the last `window` steps' mean rewards above tau? (Algorithm 1)

    The paper is silent on two things. Rewards are measured against a baseline, so those from before a promotion say nothing
    about the new one: `history` starts anew. And the window must be full: one lucky first step is no trend.
    """
    recent = history[-config.window:]
    return config.promotion and len(recent) == config.window and sum(recent) / config.window > config.tau

def grounded_rewards(policy: Policy, datasets: list[list[Problem]], questions: list[Problem], state: State, config: Config):
    """Algorithm 1, step 2: train r students a dataset and measure what they gained on the M hard `questions`.

    -> (rewards R_kj [K, r], their standard errors over the questions [K, r], (k, j, weights) of the best dataset's median
    student, figures). The questions and the baseline's accuracy on them are the same for all students of the step, so that
    the differences between rewards are the datasets' doing. Only r + 1 students are held in memory at a time.
    """
    restore(policy.model, state.baseline)
    before = greedy_right(policy, questions, config)  # [M], measured once
    r, steps = config.repeats, config.inner_steps + config.inner_extra * state.promotions
    gains, logs, kept, best, champion = [], [], {}, -math.inf, None  # kept: weights by student number k * r + j
    bar = tqdm(total=len(datasets) * r * steps // RANKS, desc=f"step {state.step}: students", leave=False,
               disable=RANK > 0 or None)

    def student(number: int):
        key = (config.seed, "student", state.step, number // r, number % r)
        policy.meter("weight swaps")
        restore(policy.model, state.baseline)
        batches = epochs(datasets[number // r], steps, config.batch, seeded(*key, "order"))
        log = train_student(policy, batches, config, key, lambda *_: bar.update())
        policy.meter("weight swaps")
        kept[number] = snapshot(policy.model)
        return greedy_right(policy, questions, config) - before, log  # [M]

    for gain, log in in_turn(policy, len(datasets) * r, student):
        gains, logs = gains + [gain], logs + log
        if len(gains) % r == 0:  # a dataset is complete
            rewards, first = [gain.mean().item() for gain in gains[-r:]], len(gains) - r
            if sum(rewards) > best:
                best, champion = sum(rewards), first + median_student(rewards)
            kept = {number: weights for number, weights in kept.items() if number >= len(gains) or number == champion}
    bar.close()
    weights = broadcast(policy, kept.get(champion), champion % RANKS)  # from the process that has trained it
    gains = torch.stack(gains).view(len(datasets), r, -1)  # [K, r, M]
    errors = gains.std(-1, correction=0) / gains.shape[-1] ** 0.5
    figures = {name: float(np.mean([log[name] for log in logs])) for name in logs[0]}
    return gains.mean(-1), errors, (*divmod(champion, r), weights), figures | {"accuracy_before": before.mean().item()}

LEARNABILITY_SAMPLES = 32  # completions a problem (paper, section 5)

def learnability_rewards(policy: Policy, datasets: list[list[Problem]], state: State, config: Config):
    """The Intrinsic-T baseline: no student trains; a problem is worth 1 - s, s the student's success rate, or 0 if s = 0.

    -> (rewards [K, 1], standard errors over the dataset's problems [K, 1], no champion, figures), as grounded_rewards.
    """
    restore(policy.model, state.baseline)
    rewards = [solve(policy, dataset, LEARNABILITY_SAMPLES, config, seeded(config.seed, "learnability", state.step, k))[1]
               for k, dataset in enumerate(datasets)]
    rates = (torch.stack(rewards) == RIGHT).double().view(len(datasets), -1, LEARNABILITY_SAMPLES).mean(-1)  # [K, n]
    values = torch.where(rates > 0, 1 - rates, 0.0)
    errors = values.std(1, correction=0, keepdim=True) / values.shape[1] ** 0.5
    return values.mean(1, keepdim=True), errors, None, {"success": rates.mean().item()}


# ======== 2. Verifier: when is an answer right? ===================================================

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

MAX_CHARS = 400      # of an answer; real ones: 198
MAX_TOKENS = 200     # and so of nested brackets, too; real answers: 127
MAX_BITS = 1 << 15   # of a number; real answers: 2004!, which has 19,000
POINTS = 24          # where formulas are compared; at many floor(n/30) and floor(n/40) agree

Tree = str | tuple   # a number or a name, or (operator, tree, ...)
Number = Fraction | mpmath.mpf | mpmath.mpc

def _boxes(text: str) -> Iterator[str]:
    """The contents of the complete, non-blank boxes, the last one (by its opening) first.

    Takes linear time: scanning on from each opening would be quadratic.
    """
    openings = []    # for each open brace: where its box's content starts, or 0
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
    return next(_boxes(text), None)

# -- Step 1: tokens. Rules respell the text, one after the other, and then synonyms become one
# token, so that the parser must know one way of writing only. To teach the verifier another way,
# add a line to a table: a rule where characters must move, a synonym where a token has a new name.

def _repeating(match: re.Match) -> str:
    r"""0.1\overline{6} -> {0.10+6/90}, which is 1/6."""
    start, decimals, cycle = match.groups()
    return f"{{{start}.{decimals}0+{cycle}/{'9' * len(cycle)}{'0' * len(decimals)}}}"

def _no_commas(match: re.Match) -> str:
    return match[0].replace(",", "")

_NOT_IN_BRACKETS = r"(?![^([{]*([)\]]|\\\}))"
_UNICODE_RULES = [(re.compile(old), new) for old, new in (
    ("[⁰¹²³⁴-⁹⁺⁻ⁿ]+", r"^{\g<0>}"),                          # x² -> x^{²}, and NFKC -> x^{2}
    ("[₀-₉]+", r"_{\g<0>}"),                                 # x₁ -> x_{₁} -> x_{1}
    ("[¼-¾⅐-⅞]", r" \g<0>"),                                 # 2½ -> 2 ½ -> 2 1⁄2
    ("[−–—‐]", "-"),                                         # all dashes are minus signs
    (r"\s", " "),                                            # and all kinds of space are one
)]
_RULES = [(re.compile(old, re.ASCII), new) for old, new in (
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
)]
_OTHER_MEANINGS = [(re.compile(old), new) for old, new in (
    (r"(?<=\d),(?=\d{3}(?!\d))" + _NOT_IN_BRACKETS, ""),     # 70,110 -> 70110
    (r"^(\d{1,3}), (\d{3}), (\d{3})$", r"\1\2\3"),           # 251, 750, 000 -> 251750000
    (r"^(\W*\d+),(\d\d|\d{4,})$", r"\1.\2"),                 # 3,14 -> 3.14
    (r"\\text\{ ?percent\}|\\?%|percent(age)?", r"{1/100}\\text{of}"),       # 25\% -> 25{1/100}
    (r"\\text\{ ?degrees\}|°|degrees", r"{\\pi/180}\\text{rad}"),            # 90° -> 90{\pi/180}
)]
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

_LEXER = re.compile(r"""
    \\(?:text[a-z]*|mbox|mathrm|operatorname)\s*\{([^{}]*)\}        # group 1: words
  | ((?:[A-Za-z][a-z]{3,} | [A-Z][a-z]{2}(?![a-z]))(?:\ (?!and)[a-z]{3,})*  # group 2: words, units
    | (?:cm|mm|km|in|ft|yd|mph|kg|lbs?|hrs?|min|sec|[ap]m|[AP]m)(?![a-z]))
  | (?:sin|cos|tan|log|exp|ln|pi|and|or)(?![a-z])
  | [a-zA-Z]'* | _(?:\w|\{[^{}]*\})                               # f', and what follows x in x_{12}
  | \d+(?:\.\d+)?(?:[eE][+-]?\d{1,4}(?!\d))? | \.\d+                # 12, 1.5, 1e-3, .5
  | \.\.\. | '' | \*\* | [<>!]=
  | \\[a-zA-Z]+ | \\. | \S""", re.VERBOSE | re.ASCII | re.DOTALL)
_WORDS = re.compile(r"(?![ei]$)(?!.*\b(and|or)\b)(?=.*[a-z])([a-z]|[A-Z][a-z]).*", re.DOTALL)

def _respell(text: str) -> str:
    """The text after all rules."""
    for old, new in _UNICODE_RULES:
        text = old.sub(new, text)
    text = unicodedata.normalize("NFKC", text)
    for old, new in _RULES:
        text = old.sub(new, text)
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
            tokens += _tokens(token.rstrip("."))             # \text{(E)}, \mathrm{e}, \text{5 cm}
        elif token[0] == "_" and tokens:
            tokens[-1] += re.sub(r"[{}\\\s]", "", token)     # x_{n+1} -> x_n+1
        else:
            tokens.append(token.replace("'", "′"))
    return tokens

# -- Step 2: a tree, by a Pratt parser. Each operator has a level, and its operands are the longest
# texts whose operators have a higher level: in 2+3x^2 the + takes 3x^2, and the ^ takes x and 2.

_LEVELS = (
    r") ] } ⟩ \rvert \rfloor \rceil ∎",    # level 0: they end what was begun; ∎ ends the text
    ",",
    "= ≠ < ≤ > ≥",
    "unit",           # 2+1 cm is 3 cm
    r": \choose",
    "+ -",            # level 5
    "* function",     # the product in 2\sin x
    "/ product",      # the product in 2x
    "^",
    "!",
)
_BINDING = {}
for _level, _operators in enumerate(_LEVELS):
    _BINDING |= dict.fromkeys(_operators.split(), _level)
_RELATIONS = set(_LEVELS[2].split())
_SHAPES = {"()", "[]", "(]", "[)", "⟨⟩"}     # tuples and intervals; ⟨⟩ is a row of a matrix
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
            if tokens[-1] == "^":                            # cm^2
                tokens.pop()
                _operand(tokens, 9)
            if _kind(tokens[-1]) == "product":
                raise ValueError("2 hours 30 minutes")
        elif kind == "!":
            left = (tokens.pop(), left)
        else:
            right_level = 7 if kind == "^" else _BINDING[kind]               # 2^3^2 is 2^(3^2)
            left = (tokens.pop(), left, _parse(tokens, right_level))

def _operand(tokens: list[str], level: int) -> Tree:
    """A number, a name, or what begins with a sign, a function or a bracket."""
    token = tokens.pop()
    if _NUMBER.match(token) and _NUMBER.match(tokens[-1]):
        raise ValueError("4 5 is no product")
    if _ATOM.match(token):
        return token
    if token in ("+", "-"):
        return (token, "0", _parse(tokens, max(level, 5)))   # -x is 0-x
    if token in (r"\frac", r"\binom"):
        return (token, _operand(tokens, 9), _operand(tokens, 9))
    if token in _FUNCTIONS:                                  # \log[2]8, \sqrt[3]8
        parameters = [_operand(tokens, 9)] if tokens[-1] == "[" else []
        narrow = token == r"\sqrt" or tokens[-1] in ("(", "{")
        return (token, _parse(tokens, 8 if narrow else 6), *parameters)
    inner = _parse(tokens)
    pair = token + tokens.pop()
    if pair == "{}" or pair in ("()", "[]", "⟨⟩") and inner[0] != ",":
        return inner                                         # a group
    if pair not in _SHAPES and pair not in _OPERATIONS:
        raise ValueError(f"{pair} is no pair of brackets")
    return (pair, *_items(inner))

def _items(tree: Tree) -> list[Tree]:
    """The items of a list, or the tree alone."""
    return _items(tree[1]) + _items(tree[2]) if tree[0] == "," else [tree]

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

_mp = mpmath.MPContext()       # a private one: anybody may set the precision of mpmath.mp
_mp.dps = 110
_CONSTANTS = {"i": _mp.j, "e": +_mp.e, r"\pi": +_mp.pi}
_INFINITE = {                  # no numbers: 1/\infty is not read
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
    return a * (1 / b)         # as a Fraction cannot be divided by an mpf

def _power(a: Number, b: Number) -> Number:
    """a^b, refused before it is built if it is too long: it has b times the bits of a."""
    if abs(b) * max(_size(a), 1) > MAX_BITS:
        raise ValueError("too long")
    whole = int(b.real)
    return a ** whole if b == whole else _mp.power(a, b)

def _factorial(n: Number) -> Number:
    if abs(n) > 3000:
        raise ValueError("too long")
    return Fraction(math.factorial(int(n))) if n == int(n) else _mp.gamma(n + 1)

def _binomial(n: Number, k: Number) -> Number:
    return _divide(_factorial(n), _factorial(k) * _factorial(n - k))

def _floor(x: Number) -> Number:
    return Fraction(int(_mp.floor(x + _mp.mpf("1e-90"))))    # (\sqrt6)^2 may be 5.999...

def _root(x: Number, n: Number = 2) -> Number:
    if isinstance(x, Fraction) and x < 0 and n == 3:
        return -_power(-x, 1 / n)                            # \sqrt[3]{-8} is -2
    return _power(x, 1 / n)

def _named(function: Callable) -> Callable:
    return lambda x, exponent=1: function(x) ** exponent     # \sin[2]x is \sin^2 x

_FUNCTIONS = {
    r"\sqrt": _root,
    r"\log": lambda x, base=_mp.e: _mp.log(x, base),
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
    if unreal or not _size(x) <= MAX_BITS:                   # no comparison is true of nan
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
    if all(x != x for x in values):
        raise ValueError("undefined")
    return values

def _digits(x: Number) -> str:
    """80 digits of a number, or all of a longer fraction: 2^{300}+1 is not 2^{300}."""
    if isinstance(x, Fraction) and _size(x) > 128:
        return f"{x.numerator:x}/{x.denominator:x}"
    return _mp.nstr(_mp.chop(_mp.convert(x), 1e-90), 80)

_FLIPPED = dict(zip("=≠<≤>≥", "=≠>≥<≤"))
_BOUNDS = {                    # what a relation makes of the line (-inf; +inf)
    "=": ("(-inf; +inf)", "#"),
    "<": ("+inf)", "#)"),
    "≤": ("+inf)", "#]"),
    ">": ("(-inf", "(#"),
    "≥": ("(-inf", "[#"),
}
_NO_LABEL = re.compile(r"""['"]([-+^!.\d]|[ie]'|\\\\(pi|infty))""")

def _labelled(tree: Tree) -> tuple[str, str]:
    r"""A label and the spelling of the rest: x=5 is x and 5.0, 3<x is x and (3.0; +inf).

    A label is anything without numbers, sums and powers: x, (x, y), V_1:V_2, |AB|, \sin A.
    """
    if tree[0] not in _RELATIONS:
        return "", _spell(tree)
    sign, name, value = tree
    before = "(-inf; +inf)"
    if name[0] in _RELATIONS:                                # 0<x<1 is (0<x)<1
        before = _labelled(name)[1]
        name = name[2]
    elif _NO_LABEL.search(str([name])):
        sign, name, value = _FLIPPED[sign], value, name
    old, new = _BOUNDS[sign]
    if _NO_LABEL.search(str([name])) or old not in before:
        raise ValueError("no value for a name")
    label = re.sub("[(),' ]+", " ", str(name))
    return label.strip(), before.replace(old, new.replace("#", _spell(value)))

def _moved(tree: Tree) -> str:
    """A relation up to moved terms and a factor, of an inequality a positive one: 2x>4 is x-2>0."""
    sign, left, right = tree
    if sign in "<≤":
        sign, left, right = _FLIPPED[sign], right, left
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
    return "|".join(digits) if len(set(digits)) > 1 else digits[0]       # \sin^2 x+\cos^2 x is 1

def _spellings(items: list[Tree]) -> Iterator[tuple[str, set]]:
    """Each (spelling, labels) of an answer's items; the labels are a set of one or none."""
    if len(items) == 1 and items[0][0] in _RELATIONS:
        with contextlib.suppress(Exception):                 # x \in (0,1) is no equation
            yield _moved(items[0]), set()
    labelled = [_labelled(item) for item in items]
    spelled = [spelling for _, spelling in labelled]
    labels = dict.fromkeys(label for label, _ in labelled if label)
    names = {" ".join(labels)} if labels else set()
    in_order = "; ".join(spelled)
    yield in_order, names                                    # -5, 14/3 beside x=-5, p=14/3
    if len(labels) < len(items):
        yield "{" + "; ".join(sorted(spelled)) + "}", names
    elif len(items) > 1:                                     # a=1, b=2 is b=2, a=1 and (1, 2)
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
    meanings = [old.sub(new, text) for old, new in _OTHER_MEANINGS]
    for meaning in dict.fromkeys([text, *meanings]):
        tokens = _tokens(meaning)
        units = {re.match(r'".?\d*', token)[0] for token in tokens if token[0] == '"'}
        with contextlib.suppress(Exception):                 # it is no mathematics, or too long
            for spelling, labels in _spellings(_read(tokens)):
                readings[spelling] = labels, units
    if words:
        readings["words " + words.lower()] = {words} if readings else set(), set()
    return readings

def parses(text: str) -> bool:
    r"""Whether the text reads as mathematics throughout; words do not, not even as \text{...}.

    >>> [parses(text) for text in ("a= 56 ,b= 54", r"\frac{3}{4}", "x+", "4=5=6", "hello world")]
    [True, True, False, False, False]
    """
    return len(_readings(text)) > 1

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
    left, right = _readings(prediction), _readings(gold)
    if re.search(r"\.\d{12}", prediction + " " + gold):
        left, right = _rounded(left), _rounded(right)
    for spelling in left.keys() & right.keys():
        pairs = zip(left[spelling], right[spelling])         # labels with labels, units with units
        if all(not mine or not theirs or mine & theirs for mine, theirs in pairs):
            return True
    return False


# ======== 14. The run folder: how does a run survive being killed? ====================================================
# The state is written after each outer step, and holds all that the next one needs. A run that is killed in between repeats
# the step from the last checkpoint and, all randomness being a function of (seed, step), writes the same files again.

RESUMABLE = ("resume", "out", "sample_rows", "micro_tokens", "checkpointing", "threads", "cache", "device")  # may differ then

def check_folder(config: Config) -> None:
    """Raises UserError when --out holds something that this command must not touch or cannot continue."""
    folder = Path(config.out)
    for name, path in (("--out", folder.parent), ("--cache", Path(config.cache))):
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot make the folder {path} ({error.strerror}); choose another {name}") from None
    if not folder.exists() or folder.is_dir() and not any(folder.iterdir()):
        return
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} exists and is not a run of soar.py; choose another --out")
    if not config.resume:
        raise UserError(f"{folder} already holds a run; add --resume to continue it, or choose another --out or --seed")
    with whole(folder / "config.json", "choose another --out"):
        old = json.loads((folder / "config.json").read_text())
    other = [f"{flag(name)} {old.get(name)}" for name, value in vars(config).items()
             if name not in RESUMABLE and old.get(name) != value]
    if other:
        raise UserError(f"{folder} was made with other flags ({', '.join(other)}); give the same ones, or choose another --out")

def save_checkpoint(folder: Path, state: State) -> None:
    """There is always one whole checkpoint; the .jsonl files are written anew from it."""
    for name in ("log", "questions", "promotion_questions"):
        if text := "".join(json.dumps(row) + "\n" for row in getattr(state, name)):
            write_whole(folder / f"{name}.jsonl", lambda file: file.write_text(text))
    write_whole(folder / "checkpoint.pt", lambda file: torch.save(vars(state), file))

def load_checkpoint(folder: Path) -> State | None:
    """The state after the last complete step, or None. Raises UserError when it is damaged."""
    path = folder / "checkpoint.pt"
    if path.exists():
        with whole(path, "put a copy back, or start again with another --out"):
            return State(**torch.load(path, weights_only=True))

@by_process_0
def save_model(model, tokenizer, folder: Path) -> None:
    """An ordinary folder for from_pretrained, all or nothing."""
    temporary = folder.with_name(folder.name + ".tmp")
    for part in (model, tokenizer):
        part.save_pretrained(temporary)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)


# ======== 15. Outer loop: how do the parts make Algorithm 1? ==========================================================

def promote(policy: Policy, champion: tuple, datasets, hard_train: list[Problem], state: State, config: Config) -> dict:
    """Algorithm 1, step 3: the champion becomes the baseline, its dataset joins D_best; the best one so far is kept on disk."""
    k, j, state.baseline = champion
    state.promotions, state.history = state.promotions + 1, []
    state.promotion_questions += map(vars, datasets[k])
    restore(policy.model, state.baseline)
    accuracy = greedy_right(policy, hard_train, config).mean().item()
    if accuracy > state.best_accuracy:
        state.best_accuracy = accuracy
        save_model(policy.model, policy.tokenizer, Path(config.out) / "student")
    return {"dataset": k, "student": j, "accuracy": accuracy}

def teacher_update(policy: Policy, rollouts: list[Rollout], advantages, state: State, config: Config) -> dict:
    """Algorithm 1, step 4, on the live model. The teacher's moments are on its device only now: students have their own."""
    device = policy.model.device
    move = lambda moments, to: {"t": moments["t"]} | {name: [x.to(to) for x in moments[name]] for name in "mv"}
    moments = move(state.moments, device)
    lr = learning_rate(config.teacher_lr, state.step, config.steps, config.teacher_warmup)
    rounding = seeded(config.seed, "teacher", state.step, "rounding", device=device)
    restore(policy.model, state.teacher)
    figures = policy_update(policy, rollouts, advantages, moments, lr, config, rounding)
    state.moments, state.teacher = move(moments, "cpu"), snapshot(policy.model)
    return figures

def outer_step(policy: Policy, hard_train: list[Problem], state: State, config: Config) -> dict:
    """One step of Algorithm 1, in place on `state` -> its row of the log, which is in state.log, too."""
    t, g, n = state.step, config.datasets, config.n
    # 1. The teacher proposes g*n problems; consecutive ones make the datasets X_1..X_g.
    restore(policy.model, state.teacher)
    accepted, proposing = propose(policy, config.groups * g * n, config, seeded(config.seed, "propose", t))
    rollouts, problems = zip(*accepted)
    datasets = [problems[i:i + n] for i in range(0, len(problems), n)]  # K = groups * g of them
    # 2. What is each dataset worth? Q_R is drawn anew each step.
    draw = torch.randperm(len(hard_train), generator=seeded(config.seed, "reward questions", t))[:config.reward_questions]
    if config.reward == "grounded":
        measured = grounded_rewards(policy, datasets, [hard_train[i] for i in draw], state, config)
    else:
        measured = learnability_rewards(policy, datasets, state, config)
    rewards, errors, champion, training = measured
    R = rewards.mean(1)  # [K], R_k
    # 3. Promotion, when the baseline is beaten lastingly.
    state.history = state.history + [R.mean().item()]
    average = float(np.mean(state.history[-config.window:]))
    due = champion is not None and promotion_due(state.history, config)
    promoted = promote(policy, champion, datasets, hard_train, state, config) if due else None
    # 4. The teacher's update: every rollout of X_k carries A_k.
    advantages = rloo_advantages(R, g).repeat_interleave(n)  # [K*n]
    updating = teacher_update(policy, rollouts, advantages, state, config)
    state.step = t + 1
    state.questions += [{"step": t, "dataset": i // n, "reward": R[i // n].item(), **vars(p)} for i, p in enumerate(problems)]
    state.log.append({
        "step": t, "rewards": rewards.tolist(), "errors": errors.tolist(), "reward": R.mean().item(), "average": average,
        "promotion": promoted, "teacher": proposing | updating, "student": training}
        | ({"topics": topic_shares(problems)} if config.dataset == "tiny" else {}))
    return state.log[-1]


# ======== 16. Main: what does a person see? ===========================================================================

def check_context(policy: Policy, pool: list[Problem], config: Config) -> None:
    """Raises UserError when a prompt and its completion may not fit into the model's context."""
    context = getattr(policy.model.config, "max_position_embeddings", None) or math.inf
    length, longest = max((len(policy.student_prompt(problem)), problem.question) for problem in pool)
    empty = len(policy.student_prompt(Problem("", "")))
    needed = {f"the problem that begins {longest[:60]!r}": length + config.student_tokens,
              "the teacher's prompt": len(policy.teacher_prompt()) + config.teacher_tokens,
              "a problem of --teacher-tokens": empty + config.teacher_tokens + config.student_tokens}
    what, tokens = max(needed.items(), key=lambda item: item[1])
    if tokens > context:
        raise UserError(f"{what} needs {tokens} tokens with its completion, and the model's context has {context}; "
                        "lower --student-tokens or --teacher-tokens, or leave long problems out")

def student_completions(config: Config, promotions: int, questions: int) -> int:
    """What the students of one outer step sample after so many promotions: in training, and greedily on the questions."""
    K, steps = config.groups * config.datasets, config.inner_steps + config.inner_extra * promotions
    if config.reward == "learnability":
        return K * config.n * LEARNABILITY_SAMPLES
    return K * config.repeats * steps * config.batch * config.group + (K * config.repeats + 1) * questions

def print_plan(pool: list[Problem], policy: Policy, config: Config) -> None:
    """What is going to happen and what it costs, before it starts."""
    K, n, students = config.groups * config.datasets, config.n, student_completions(config, 0, config.reward_questions)
    by_students, by_teacher = len(pool) * config.k + config.steps * students, config.steps * K * n
    tokens = by_students * config.student_tokens + by_teacher * config.teacher_tokens
    more = f"; each promotion adds {config.inner_extra} steps to a student" * (config.promotion and config.inner_extra > 0)
    work = f"{config.repeats} students train on each, {config.inner_steps} steps of {config.batch} x {config.group}"
    reward = """the share of the hard questions that a student gains by training on the teacher's problems, on average
                     over the students; below zero the training did harm"""
    promotion = f"""above {config.tau:g} (tau) a student is promoted: it becomes the
                     baseline, from which later students start and over which they must gain"""
    if config.reward == "learnability":
        more, work = "", f"the student tries each problem {LEARNABILITY_SAMPLES} times"
        reward = """1 - s, on average over the teacher's problems, s the share of right answers of the student, which
                     does not train; 0 where s is 0"""
    if config.reward == "learnability" or not config.promotion:
        promotion = "nobody is promoted in this run"
    print(f"""SOAR on {config.dataset}: {len(pool)} problems, model {config.model}, {policy.model.device}, folder {config.out}
  filter      keep the problems that the model fails {config.k} times of {config.k}: at most {len(pool) * config.k:,} completions
  outer step  the teacher writes {K} datasets of {n} problems;
              {work}: {students:,} student completions
  in all      {config.steps} outer steps: {by_teacher + by_students:,} completions, at most {tokens:,} tokens{more}

What the columns of a step say:
  reward             {reward}; best dataset: the largest mean of one dataset
  moving average     of the last {config.window} rewards; {promotion}
  right in training  the share of right answers of the students to the teacher's problems
  accepted           the share of the teacher's completions that hold a problem with a readable answer
""", flush=True)

def show_step(policy: Policy, state: State, config: Config) -> None:
    """A line about the last step, its promotion and, every five steps, one problem and the baseline student's attempt at it."""
    row, question = state.log[-1], state.questions[-1]
    line = (f"step {row['step']:3d}  reward {row['reward']:+.3f}  best dataset {max(map(np.mean, row['rewards'])):+.3f}  "
            f"moving average {row['average']:+.3f}  right in training {row['student']['success']:4.0%}  "
            f"accepted {row['teacher']['acceptance']:4.0%}  {sum(row['cost']['seconds'].values()):.0f} s")
    if promoted := row["promotion"]:
        line += (f"\n          PROMOTION: student {promoted['student']} of dataset {promoted['dataset']} is the new baseline, "
                 f"{promoted['accuracy']:.1%} greedy on the hard train set.\n"
                 "          Its problems join the promotion questions. From now on rewards are gains over this better student.")
    if row["step"] % 5 == 0:
        restore(policy.model, state.baseline)
        attempt = solve(policy, [Problem(question["question"], question["answer"])], 1, config)[0][0].text
        for speaker, text in (("teacher:", question["question"]), ("answer:", question["answer"]), ("student:", attempt)):
            line += f"\n    {speaker:9}" + text.strip().replace("\n", "\n             ")
    tqdm.write(line, file=sys.stdout)
    sys.stdout.flush()

KS = (1, 4, 8, 16, 32)  # of pass@k (paper)

def right_counts(policy: Policy, problems: list[Problem], n: int, config: Config, generator) -> list[int]:
    """How many of n attempts of the live model are right, for each problem."""
    return (solve(policy, problems, n, config, generator)[1] == RIGHT).view(-1, n).sum(1).tolist()

def measure(policy: Policy, problems: list[Problem], config: Config) -> dict:
    """Greedy accuracy and mean pass@k of the live model, k = 1, 4, 8, 16, 32 as far as --eval-samples allows."""
    n = config.eval_samples
    right = right_counts(policy, problems, n, config, seeded(config.seed, "report"))
    return {"greedy": greedy_right(policy, problems, config).mean().item()} | {
        f"pass@{k}": float(np.mean([pass_at_k(n, c, k) for c in right])) for k in KS if k <= n}

def print_table(title: str, rows: dict[str, dict[str, float]]) -> None:
    print(f"\n{title}\n{'':18}" + "".join(f"{column:>12}" for column in next(iter(rows.values()))))
    for name, row in rows.items():
        print(f"{name:18}" + "".join(f"{value:12.1%}" for value in row.values()))

def report(policy: Policy, hard_test: list[Problem], state: State, config: Config) -> None:
    """The closing tables, also written to report.json."""
    restore(policy.model, policy.base)
    students, topics = {"base model": measure(policy, hard_test, config)}, {}
    if state.promotions:  # from the run folder: the table is about what was saved
        restore(policy.model, snapshot(load_model(f"{config.out}/student", config)[0]))
        students["promoted student"] = measure(policy, hard_test, config)
    print_table(f"On the {len(hard_test)} held-out hard problems (never trained on, never a reward);\n"
                "pass@k is the chance that at least one of k sampled answers is right:", students)
    if config.dataset == "tiny":
        for name, weights in (("at the start", policy.base), ("at the end", state.teacher)):
            restore(policy.model, weights)
            accepted, _ = propose(policy, 400, config, seeded(config.seed, "report topics"))
            topics[name] = topic_shares([problem for _, problem in accepted])
        print_table("The teacher's problems:", topics)
    write_json(Path(config.out) / "report.json", {"students": students, "topics": topics, "promotions": state.promotions})
    print(f"\n{state.promotions} promotion(s), {len(state.promotion_questions)} promotion questions; see {config.out}/"
          + "\nNo student was promoted, so the student is still the base model." * (not state.promotions))

def prepare(config: Config, meter: Meter) -> tuple[Policy, list[Problem]]:
    """The policy and the pool of problems. Raises UserError."""
    if config.threads:
        torch.set_num_threads(config.threads)
    if config.dataset == "tiny":
        pool = hard_worksheets(make_world(config.data_seed), config.pool, config.data_seed)
    else:
        pool = load_problems(config.dataset)
        if 0 < config.pool < len(pool):
            pool = random.Random(f"pool {config.data_seed}").sample(pool, config.pool)
    policy = load_policy(tiny_base_model(config) if config.model == "tiny" else config.model, config, meter)
    check_context(policy, pool, config)
    return policy, pool

def run(config: Config, meter: Meter) -> None:
    """Everything, from the flags to the closing table. Raises UserError."""
    join_processes(config)
    check_folder(config)
    gather("checked")  # before process 0 writes into the folder
    folder = Path(config.out)
    policy, pool = prepare(config, meter)
    print_plan(pool, policy, config)
    hard = hard_problems(policy, pool, config)
    hard_train, hard_test = split_hard(hard, config)
    print(f"{len(hard)} of {len(pool)} problems are fail@{config.k}: {len(hard_train)} for the reward, "
          f"{len(hard_test)} held out\n", flush=True)
    state = load_checkpoint(folder) or State(policy.base, adamw_state(policy.model), policy.base)
    write_json(folder / "config.json", vars(config))
    while state.step < config.steps:
        meter("other")
        meter.seconds.clear(), meter.tokens.clear()
        row = outer_step(policy, hard_train, state, config)
        meter("saving")
        training = sum(meter.seconds[phase] for phase in ("log-probs", "backward", "optimizer"))
        row["cost"] = {"seconds": dict(meter.seconds), "peak_memory_gb": peak_memory_gb(policy.model.device),
                       "tokens_per_second": {"sampled": meter.tokens["sampled"] / meter.seconds["sampling"],
                                             "trained": meter.tokens["trained"] / (training or math.inf)}}
        save_checkpoint(folder, state)
        show_step(policy, state, config)
    restore(policy.model, state.teacher)
    save_model(policy.model, policy.tokenizer, folder / "teacher")
    report(policy, hard_test, state, config)

def peak_memory_gb(device) -> float:
    """Of the GPU, or of this process on a CPU (0 where the system does not tell)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    with contextlib.suppress(ImportError):  # Windows
        import resource
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e9 if sys.platform == "darwin" else 1e6)
    return 0.0

def quiet_libraries() -> None:
    import transformers  # late: --help and most mistakes need not wait for it
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()

def guarded(program: str, work, meter: Meter, again: list[str]) -> int:
    """work() as an exit code: 0; 2 after a mistake that the user can mend, said in one sentence; 130 after Ctrl-C.

    `again` is the command that goes on where an interrupted one stopped.
    """
    code, again = 2, shlex.join(again)
    try:
        work()
        return 0
    except UserError as error:
        sentence = error
    except KeyboardInterrupt:
        code, sentence = 130, f"interrupted; all complete steps are saved, continue with: {again}"
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        broken_off = RANKS > 1 and re.search("gloo|nccl", str(error), re.IGNORECASE)
        if type(error) is RuntimeError and not broken_off and "allocate memory" not in str(error):  # so PyTorch says it on a CPU
            raise
        train = "lower --micro-tokens or add --checkpointing"
        advice = {"sampling": "lower --sample-rows", "log-probs": train, "backward": train}
        advice = advice.get(meter.phase, "take a smaller --model")
        sentence = f"out of memory (phase: {meter.phase}); {advice} and go on with: {again}"
        if broken_off:
            sentence = "another process has stopped; its message says why"
    print(f"{program}{f' (process {RANK})' * (RANKS > 1)}: {sentence}", file=sys.stderr, flush=True)
    return code

def main(argv: list[str] | None = None) -> int:
    argv, meter = sys.argv[1:] if argv is None else argv, Meter()

    def work():
        config = parse_config(argv)
        quiet_libraries()
        run(config, meter)

    return guarded("soar", work, meter, ["python", "soar.py", *argv] + ["--resume"] * ("--resume" not in argv))

if __name__ == "__main__":
    sys.exit(main())
