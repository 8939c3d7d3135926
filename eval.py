#!/usr/bin/env python3
"""Did it work, compared with what, and how sure are we? The rows of the paper's Tables 1 and 4-6, for runs of soar.py.

    python eval.py runs/tiny-0                              base, Hard-Only, PS and PQ of one run
    python eval.py runs/tiny-0 runs/tiny-1 --seeds 2        two teacher seeds, two students each
    python eval.py runs/tiny-* --methods all --plot         every row, and the curves as a PNG
    python eval.py runs/math_test-0 --dataset olympiad      transfer: SOAR never saw this data set
    python eval.py --benchmark                              speed, see section 6

A method is a way to get a student: train a fresh copy of the base model on something, or take what SOAR has left in a run
folder. Every student is measured by pass@k on the held-out half of the fail@128 problems. A run folder is a teacher seed;
which rows it can fill depends on how it was made: --reward learnability: intrinsic-t; --no-promotion: no-promotion; else the
others.

Contents: 1 Settings, 2 Measures, 3 Run folders, 4 Students, 5 Tables and curves, 6 Benchmark, 7 Main.
"""
from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import random
import re
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from tqdm import tqdm

import soar
from soar import KS, RIGHT, Config, Meter, Policy, Problem, UserError

# ======== 1. Settings: which rows, how many students, how long? =======================================================

# name: (what it is, the kind of run that it needs; "any": of runs with the same hard set only the first is asked)
METHODS = {
    "base": ("the base model", "any"),
    "hard-only": ("a fresh student on the hard train set", "any"),
    "hard-only-4x": ("the same with groups four times as large", "any"),
    "hard-only-equal": ("the same with as many completions as all students of the run together", "any"),
    "ps": ("the promoted student as it is", "grounded"),
    "pq": ("a fresh student on the promotion questions and the hard train set", "grounded"),
    "pq-well-posed": ("PQ with the well-posed promotion questions only (tiny world)", "grounded"),
    "pq-correct": ("PQ with the promotion questions that have a right answer only (tiny world)", "grounded"),
    "grounded-t": ("a fresh student on questions of the trained teacher and the hard train set", "grounded"),
    "no-promotion": ("the same with the teacher of a --no-promotion run", "no-promotion"),
    "intrinsic-t": ("the same with the teacher of a --reward learnability run", "learnability"),
    "base-t": ("the same with the untrained teacher", "any"),
    "upper": ("the same with curated problems: --curated, or right answers to easy sheets in the tiny world", "any"),
    "solver": ("the trained teacher as a solver", "grounded"),
}
# Percent, pass@1, 4, 8, 16, 32 (paper, Tables 1 and 4-6); printed in brackets beside ours.
PAPER = {
    "math": {"base": (0.3, 1.0, 2.0, 3.9, 7.5), "hard-only": (0.5, 1.7, 3.2, 5.7, 9.6),
             "hard-only-4x": (1.4, 3.9, 6.1, 8.9, 12.4), "pq": (1.7, 5.3, 8.5, 13.0, 18.9), "ps": (1.0, 3.8, 6.8, 11.5, 18.1),
             "grounded-t": (1.6, 5.1, 8.4, 13.1, 19.1), "intrinsic-t": (1.0, 3.3, 5.7, 9.2, 14.1),
             "solver": (0.3, 1.1, 2.2, 4.4, 8.3), "upper": (2.7, 7.6, 11.5, 16.4, 22.0)},
    "harp": {"base": (0.2, 0.9, 1.7, 3.4, 6.4), "hard-only": (0.4, 1.4, 2.6, 4.7, 8.2), "pq": (0.7, 2.5, 4.5, 7.7, 12.3),
             "ps": (0.6, 2.1, 3.9, 7.0, 11.8), "grounded-t": (0.5, 2.0, 3.8, 6.7, 11.2),
             "intrinsic-t": (0.4, 1.6, 3.1, 5.6, 9.6), "upper": (1.7, 5.1, 8.1, 11.7, 16.2)},
    "olympiad": {"base": (0.2, 0.8, 1.6, 3.1, 5.8), "hard-only": (0.3, 1.1, 2.1, 3.9, 6.9), "pq": (0.5, 1.9, 3.6, 6.4, 10.6),
                 "ps": (0.6, 2.1, 3.7, 6.2, 9.9), "upper": (0.9, 3.2, 5.6, 8.8, 13.1)},  # PQ and PS: of a MATH run
}


@dataclass
class Settings:
    # --- What to measure
    methods: str = "base,hard-only,ps,pq"  # comma-separated, or all
    dataset: str = ""  # the hard set that fresh students train and all are tested on; empty: the run's own
    seeds: int = 1  # students (or, where none is trained, samplings) a run folder
    seed: int = 0  # the first of them
    samples: int = 32  # completions a problem behind pass@k (paper: 32)
    points: int = 20  # measurements during a fresh student's training
    # --- Fresh students (0: as the data set wants it)
    steps: int = 0  # RLOO steps; 0: 1500, the paper's most; tiny: 200
    warmup: int = 20  # steps of linear warm-up, except in a curriculum (Table 3)
    mix: str = "auto"  # curriculum: synthetic, then hard; mixed: both throughout; auto: mixed on harp and olympiad (paper)
    synthetic_steps: int = 64  # of a curriculum (paper, MATH)
    questions: int = 128  # drawn from a teacher (paper)
    curated: str = ""  # FILE.jsonl of problems for --methods upper
    # --- Diversity
    embedder: str = ""  # hub id or folder of the model whose hidden states compare questions; empty: the base model
    # --- Output
    out: str = ""  # folder for eval.json, eval.md and eval.png; empty: the first run folder
    plot: bool = False  # write the curves (needs matplotlib)
    # --- This machine (empty or 0: as the run was made)
    device: str = ""  # cuda, cpu, ...
    threads: int = 0  # torch's CPU threads
    sample_rows: int = 0  # completions sampled side by side
    micro_tokens: int = 0  # padded tokens in one backward pass


def parse_settings(argv: list[str]) -> tuple[list[str], Settings]:
    """Command line -> (run folders, Settings). Raises UserError."""
    methods = "\n".join(f"  {name:16}{what}" for name, (what, _) in METHODS.items())
    parser = argparse.ArgumentParser(
        usage="python eval.py RUN [RUN ...] [flags], or python eval.py --benchmark [flags]", allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter, description=f"{__doc__.splitlines()[0]}\nMethods:\n{methods}")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders that soar.py has written")
    flags = soar.parse_flags(parser, Settings, argv)
    runs, settings = flags.pop("runs"), Settings(**flags)
    for name, least in dict(seeds=1, samples=1, points=1, steps=0, warmup=0, synthetic_steps=0, questions=1).items():
        if getattr(settings, name) < least:
            raise UserError(f"--{name.replace('_', '-')} must be at least {least}")
    if settings.samples < max(KS):
        raise UserError(f"pass@{max(KS)} needs at least {max(KS)} samples a problem; --samples is {settings.samples}")
    if settings.mix not in ("auto", "curriculum", "mixed"):
        raise UserError("--mix must be one of auto, curriculum, mixed")
    if unknown := [name for name in chosen_methods(settings) if name not in METHODS]:
        raise UserError(f"--methods {','.join(unknown)} does not exist; choose from {', '.join(METHODS)}, or all")
    if settings.plot:
        try:
            import matplotlib  # noqa: F401
        except ImportError:
            raise UserError("--plot needs matplotlib: pip install matplotlib, or leave the flag out") from None
    return runs, settings


def chosen_methods(settings: Settings) -> list[str]:
    return list(METHODS) if settings.methods == "all" else [name.strip() for name in settings.methods.split(",")]


# ======== 2. Measures: what is one number, and how far may it be off? =================================================


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
    smooth = np.array([np.mean(rewards[max(0, s - half):s + half + 1]) for s in range(len(rewards))])
    slopes = np.gradient(smooth)
    if slopes.max() <= 1e-9:
        return 0
    steepest = int(slopes.argmax())
    below = np.flatnonzero(slopes[steepest:] < flat * slopes.max())
    return steepest + int(below[0]) if len(below) else len(rewards)


def nested(values) -> dict:
    """[teacher seeds R][student seeds N] -> mean, SD over all of them, SD of the teachers' means, their number.

    >>> nested([[0.1, 0.3], [0.5, 0.7]])["mean"], round(nested([[0.1, 0.3], [0.5, 0.7]])["sd_teachers"], 4)
    (0.4, 0.2828)
    """
    flat = np.concatenate([np.asarray(row, float) for row in values])
    sd = lambda x: float(np.std(x, ddof=1)) if len(x) > 1 else None
    return {"mean": float(flat.mean()), "sd": sd(flat), "sd_teachers": sd([np.mean(row) for row in values]), "n": len(flat)}


def bootstrap(per_problem: list[np.ndarray], draws: int = 1000) -> list[float]:
    """95 % interval of the mean when problems are drawn anew: [R] arrays [problems], resampled within each run."""
    rng = np.random.default_rng(0)
    means = [values[rng.integers(len(values), size=(draws, len(values)))].mean(1) for values in per_problem]  # [R][draws]
    return np.percentile(np.mean(means, 0), [2.5, 97.5]).tolist()


def vendi(embeddings: np.ndarray) -> float:
    """Vendi score (effective number of different items): exp(-sum l ln l), l the eigenvalues of K / n, K_ij = cosine(x_i, x_j).

    >>> round(vendi(np.ones((5, 3))), 6), round(vendi(np.eye(5)), 6)       # the same five times; five that share nothing
    (1.0, 5.0)
    """
    unit = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    eigenvalues = np.linalg.eigvalsh(unit @ unit.T / len(unit)).clip(min=0)
    positive = eigenvalues[eigenvalues > 0]
    return float(np.exp(-(positive * np.log(positive)).sum()))


def judge(problem: Problem) -> tuple[bool, bool]:
    """(well-posed, right) of a tiny-world problem, exactly: it asks for sums and products of known numbers; all are right."""
    items = re.findall(r"= (\d)([*+])(\d)", problem.question)
    if soar.worksheet(["".join(item) for item in items]) != problem.question:
        return False, False
    values = [int(x) * int(y) if sign == "*" else int(x) + int(y) for x, sign, y in items]
    return True, soar.answers_equal(problem.answer, soar.worksheet(values))


def majority_agrees(boxes: list[str | None], answer: str) -> bool:
    """Whether the most frequent answer (None: a solution without a box, which has no vote) is the given one."""
    votes = [box for box in boxes if box is not None]
    support = [sum(soar.answers_equal(vote, other) for other in votes) for vote in votes]
    return bool(votes) and soar.answers_equal(votes[int(np.argmax(support))], answer)


# ======== 3. Run folders: what has SOAR left there? ===================================================================


@dataclass
class Run:
    folder: Path
    config: Config
    policy: Policy
    train: list[Problem]  # hard
    test: list[Problem]
    log: list[dict]
    report: str  # text of report.json
    promotion_questions: list[Problem]
    dropped: int  # test problems that are also in the run's own pool

    @property
    def kind(self) -> str:
        return kind_of(self.config)

    @property
    def tiny(self) -> bool:
        return self.config.dataset == "tiny"


def read_config(folder: Path, settings: Settings) -> Config:
    """The run's flags, with this machine's in their place. Raises UserError where there is no finished run."""
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} is no run folder of soar.py (it has no config.json)")
    if not (folder / "report.json").is_file():
        raise UserError(f"the run in {folder} is not finished: continue it with soar.py --resume and its flags")
    try:
        config = Config(**json.loads((folder / "config.json").read_text()))
    except (ValueError, TypeError):
        raise UserError(f"{folder}/config.json is damaged or of another version of soar.py; make the run again") from None
    machine = {name: getattr(settings, name) for name in ("device", "threads", "sample_rows", "micro_tokens")}
    return dataclasses.replace(config, **{name: value for name, value in machine.items() if value})


def read_log(path: Path) -> list[dict]:
    """The rows of log.jsonl or questions.jsonl. Raises UserError."""
    try:
        return [row for line in path.read_text().splitlines() if (row := json.loads(line))["step"] >= 0]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{path} is damaged; put a copy back, or make the run again") from None


def kind_of(config: Config) -> str:
    """grounded, no-promotion or learnability."""
    return "learnability" if config.reward == "learnability" else "grounded" if config.promotion else "no-promotion"


def open_run(folder: Path, config: Config, settings: Settings) -> Run:
    """Load the base model, filter (cached) and split the hard set. Raises UserError."""
    name = settings.dataset or config.dataset
    if name != config.dataset and "tiny" in (name, config.dataset):
        raise UserError(f"--dataset {name} does not fit the run in {folder}, which is of {config.dataset}: the tiny world's "
                        "model knows nothing else")
    policy, pool = soar.prepare(config, Meter())
    dropped = 0
    if name != config.dataset:
        words = lambda problem: "".join(problem.question.split()).lower()
        known = set(map(words, pool))
        other = soar.load_problems(name)
        pool = [problem for problem in other if words(problem) not in known]
        dropped = len(other) - len(pool)  # 122 problems are in both MATH's test split and HARP
        soar.check_context(policy, pool, config)
    train, test = soar.split_hard(soar.hard_problems(policy, pool, config), config)
    lines = folder / "promotion_questions.jsonl"
    questions = soar.read_jsonl(str(lines)) if lines.exists() else []
    return Run(folder, dataclasses.replace(config, dataset=name), policy, train, test, read_log(folder / "log.jsonl"),
               (folder / "report.json").read_text(), questions, dropped)


def student_rollouts(run: Run) -> int:
    """Completions that all students of the run sampled: training, and greedy measurements on the reward questions."""
    c, total, promotions = run.config, 0, 0
    if run.kind == "learnability":
        return len(run.log) * c.groups * c.datasets * c.n * soar.LEARNABILITY_SAMPLES
    for row in run.log:
        students = c.groups * c.datasets * c.repeats
        total += students * (c.inner_steps + c.inner_extra * promotions) * c.batch * c.group
        total += (students + 1) * min(c.reward_questions, len(run.train))
        promotions += row["promotion"] is not None
    return total


def saved_weights(run: Run, name: str) -> list[torch.Tensor]:
    """The weights in student/ or teacher/. A run without promotions has no student/: its student is the base model."""
    folder = run.folder / name
    if not folder.is_dir():
        if name == "student" and not any(row["promotion"] for row in run.log):
            return run.policy.base
        raise UserError(f"{run.folder} has no {name}/; make the run again with soar.py")
    return soar.snapshot(soar.load_model(str(folder), run.config)[0])


def remembered(run: Run, name: str, depends_on: tuple, work):
    """work(path), made once: kept in the run folder's eval/, under a name made of all that the result depends on."""
    path = run.folder / "eval" / f"{name}-{soar.fingerprint(run.report, *depends_on)}.json"
    path.parent.mkdir(exist_ok=True)
    if not path.exists():
        soar.write_json(path, work(path))
    return json.loads(path.read_text())


def questions_for(run: Run, method: str, settings: Settings, seed: int) -> list[Problem]:
    """The synthetic problems of a method; none for hard-only. Raises UserError."""
    if method.startswith("pq"):
        wanted = {"pq": lambda p: True, "pq-well-posed": lambda p: judge(p)[0], "pq-correct": lambda p: judge(p)[1]}[method]
        return [problem for problem in run.promotion_questions if wanted(problem)]
    if method == "upper":
        if settings.curated:
            return soar.read_jsonl(settings.curated)
        if not run.tiny:
            raise UserError("--methods upper needs curated problems: --curated FILE.jsonl")
        facts = [f"{x}*{y}" for x in range(4, 10) for y in range(4, 10)]
        return [Problem(soar.worksheet([fact]), soar.worksheet([int(fact[0]) * int(fact[2])])) for fact in facts]

    def ask_teacher(path):
        soar.restore(run.policy.model, run.policy.base if method == "base-t" else saved_weights(run, "teacher"))
        generator = soar.seeded(run.config.seed, "eval questions", method, seed)
        return [vars(problem) for _, problem in soar.propose(run.policy, settings.questions, run.config, generator)[0]]

    if method in ("grounded-t", "no-promotion", "intrinsic-t", "base-t"):
        asked = remembered(run, f"questions-{method}-{seed}", (settings.questions,), ask_teacher)
        return [Problem(**problem) for problem in asked]
    return []


# ======== 4. Students: train one, measure it, remember it =============================================================


@torch.inference_mode()
def embed(run: Run, settings: Settings, problems: list[Problem]) -> np.ndarray:
    """Questions -> [problems, D]: mean-pooled last hidden states of the base model, or of --embedder. Raises UserError."""
    model, tokenizer = run.policy.model, run.policy.tokenizer
    if settings.embedder:
        model, tokenizer = soar.load_model(settings.embedder, run.config)
    else:
        soar.restore(model, run.policy.base)
    rows = []
    for problem in problems:  # one at a time: no padding to leave out of the mean
        ids = torch.tensor([tokenizer(problem.question).input_ids], device=model.device)  # [1, T]
        rows.append(model.base_model(input_ids=ids).last_hidden_state[0].float().mean(0).cpu().numpy())  # [D]
    return np.stack(rows)


def measure(run: Run, settings: Settings, key: tuple) -> list[int]:
    """Right answers of the live model among --samples at each test problem -> [problems]."""
    return soar.right_counts(run.policy, run.test, settings.samples, run.config, soar.seeded(*key, "measure"))


def schedule(run: Run, method: str, synthetic: list[Problem], settings: Settings, key: tuple) -> tuple[list, Config]:
    """(the batches of a fresh student, its Config). Curriculum: synthetic problems, then hard ones; mixed: both, shuffled."""
    config, mix = run.config, settings.mix
    if mix == "auto":
        mix = "mixed" if config.dataset in ("harp", "olympiad") else "curriculum"
    group = config.group * (4 if method == "hard-only-4x" else 1)
    steps = settings.steps or (200 if run.tiny else 1500)
    if method == "hard-only-equal":
        steps = math.ceil(student_rollouts(run) / (config.batch * group))
    order = soar.seeded(*key, "order")
    if synthetic and mix == "curriculum":
        first = min(settings.synthetic_steps, steps)
        batches = soar.epochs(synthetic, first, config.batch, order)
        batches += soar.epochs(run.train, steps - first, config.batch, order)
    else:
        batches = soar.epochs(synthetic + run.train, steps, config.batch, order)
    warmup = 0 if synthetic and mix == "curriculum" else settings.warmup
    return batches, dataclasses.replace(config, group=group, student_warmup=warmup)


def student(run: Run, method: str, seed: int, settings: Settings) -> dict:
    """One student of a method -> {"points": [{"step", "right" [problems]}], "reward" [S], "rollouts" (spent on training)}."""
    policy, key = run.policy, ("eval", run.config.seed, method.removesuffix("-equal"), seed)
    synthetic, saved = questions_for(run, method, settings, seed), {"ps": "student", "solver": "teacher"}.get(method)
    trains = method != "base" and not saved
    batches, config = schedule(run, method, synthetic, settings, key) if trains else ([], run.config)

    def work(path):
        soar.restore(policy.model, saved_weights(run, saved) if saved else policy.base)
        if trains:
            return train_and_measure(run, batches, config, settings, key, path.with_suffix(".pt"), f"{method} {seed}")
        return {"points": [{"step": 0, "right": measure(run, settings, key)}], "reward": [], "rollouts": 0}

    flags = {name: value for name, value in vars(config).items() if name not in soar.RESUMABLE}
    return remembered(run, f"{method}-{seed}", (flags, run.train, run.test, batches, settings.samples, settings.points), work)


def train_and_measure(run: Run, batches, config: Config, settings: Settings, key: tuple, path: Path, label: str) -> dict:
    """The live model as a fresh student, measured --points times on the way; each leaves a checkpoint, to go on from."""
    model, moments = run.policy.model, soar.adamw_state(run.policy.model)
    result = {"points": [], "reward": [], "rollouts": len(batches) * config.batch * config.group}
    if path.exists():
        try:
            saved = torch.load(path, weights_only=True, map_location=model.device)
            moments, result = saved["moments"], json.loads(saved["result"])
            soar.restore(model, saved["weights"])
        except Exception:  # a zip error, a pickle error, a missing key
            raise UserError(f"{path} is damaged; delete it and this student starts again") from None
    stops = {math.ceil(len(batches) * i / settings.points) for i in range(1, settings.points + 1)}
    bar = tqdm(total=len(batches), initial=len(result["reward"]), desc=label, disable=None, leave=False)

    def point(step):
        result["points"].append({"step": step, "right": measure(run, settings, (*key, step))})

    def after_step(step, figures):
        result["reward"].append(figures["reward"])
        bar.update()
        if step + 1 in stops:
            point(step + 1)
            state = {"weights": soar.snapshot(model), "moments": moments, "result": json.dumps(result)}
            soar.write_whole(path, lambda file: torch.save(state, file))

    if not result["points"]:
        point(0)
    soar.train_student(run.policy, batches, config, key, after_step, moments, len(result["reward"]))
    bar.close()
    path.unlink()
    return result


def about_questions(run: Run, method: str, settings: Settings) -> dict:
    """Diversity and correctness of a method's synthetic problems; {} where it has none."""
    problems = questions_for(run, method, settings, settings.seed)

    def work(path):
        rng, embeddings = np.random.default_rng(0), embed(run, settings, problems)
        draws = [vendi(embeddings[rng.integers(len(problems), size=len(problems))]) for _ in range(100)]
        about = {"questions": len(problems), "vendi": float(np.mean(draws))}
        if run.tiny:
            verdicts = np.array([judge(problem) for problem in problems], float)
            return about | dict(zip(("well-posed", "correct"), verdicts.mean(0).tolist())) | soar.topic_shares(problems)
        soar.restore(run.policy.model, run.policy.base)
        generator, n = soar.seeded(run.config.seed, "majority"), settings.samples
        boxes = [soar.extract_boxed(rollout.text) for rollout in soar.solve(run.policy, problems, n, run.config, generator)[0]]
        agree = [majority_agrees(boxes[i * n:(i + 1) * n], problem.answer) for i, problem in enumerate(problems)]
        return about | {"agrees with the base model's majority vote": float(np.mean(agree))}

    return remembered(run, f"about-{method}", (problems, settings.embedder, settings.samples), work) if problems else {}


def diversity_curve(run: Run, settings: Settings) -> dict:
    """Vendi score of (at most) the first 128 questions of some 20 outer steps -> {"step": [...], "vendi": [...]}."""
    def work(path):
        rows = read_log(run.folder / "questions.jsonl")
        steps = list(range(0, run.config.steps, math.ceil(run.config.steps / 20)))
        asked = [[Problem(row["question"], "") for row in rows if row["step"] == step][:128] for step in steps]
        parts = np.split(embed(run, settings, sum(asked, [])), np.cumsum([len(problems) for problems in asked])[:-1])
        return {"step": steps, "vendi": [vendi(part) for part in parts]}

    return remembered(run, "diversity", (settings.embedder,), work)


# ======== 5. Tables and curves: how do the numbers become readable? ===================================================


def rates(result: dict, dataset: str, samples: int, last: bool) -> dict[int, np.ndarray]:
    """{k: pass@k [problems]}: of the last step, or the mean over the paper's choice and the 200 steps after it."""
    low, high = 50, 50  # the paper's choice on OlympiadBench
    if dataset != "olympiad":
        low = chosen_step(result["reward"])
        high = low + 200
    later = [p for p in result["points"] if p["step"] >= low] or result["points"][-1:]
    chosen = result["points"][-1:] if last else [p for p in later if p["step"] <= high] or later[:1]
    return {k: np.mean([[soar.pass_at_k(samples, c, k) for c in p["right"]] for p in chosen], 0) for k in KS}


def summary(results: list[list[dict]], dataset: str, samples: int) -> dict:
    """[R][N] students of one method -> {"pass@k": mean, sd, n, interval; the same of the last step under "last"; curves}."""
    chosen, final = ([[rates(result, dataset, samples, last) for result in row] for row in results] for last in (False, True))
    both = [{f"pass@{k}": nested([[v[k].mean() for v in row] for row in values])
             | {"interval": bootstrap([np.mean([v[k] for v in row], 0) for row in values])} for k in KS}
            for values in (chosen, final)]
    flat = sum(results, [])
    mean = lambda p, k: float(np.mean([soar.pass_at_k(samples, c, k) for c in p["right"]]))
    curves = [[{"step": p["step"]} | {f"pass@{k}": mean(p, k) for k in KS} for p in result["points"]] for result in flat]
    return both[0] | {"last": both[1], "rollouts": max(result["rollouts"] for result in flat), "curves": curves}


def methods_table(methods: dict, dataset: str) -> list[list[str]]:
    """Rows of cells: percent, mean and SD, the paper's figure in brackets."""
    rows = [["method", "n", *(f"pass@{k}" for k in KS), "95 % interval of pass@1"]]
    for name, entry in methods.items():
        paper = [f" [{figure}]" for figure in PAPER.get(dataset, {}).get(name, ())] or [""] * len(KS)
        last = [(f"{name}, last step", entry["last"], [""] * len(KS))] if entry["rollouts"] else []
        for label, part, brackets in [(name, entry, paper), *last]:
            cells = [part[f"pass@{k}"] for k in KS]
            low, high = part["pass@1"]["interval"]
            rows.append([label, str(cells[0]["n"]), *(
                f"{cell['mean']:.1%}"[:-1] + ("" if cell["sd"] is None else f" ± {cell['sd']:.1%}"[:-1]) + bracket
                for cell, bracket in zip(cells, brackets)), f"{100 * low:.1f} to {100 * high:.1f}"])
    return rows


def questions_table(questions: dict) -> list[list[str]]:
    columns = list(next(iter(questions.values())))
    show = lambda name, value: f"{value:.1f}" if name in ("vendi", "questions") else f"{value:.0%}"
    return [["problems of", *columns]] + [[method, *(show(name, entry[name]["mean"]) for name in columns)]
                                          for method, entry in questions.items()]


def markdown(rows: list[list[str]]) -> str:
    """A Markdown table whose columns are aligned, so that it can also be read on a screen."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def draw(axis, xs: list, ys: list, color, line: str = "-", label: str | None = None) -> None:
    """One thin line a seed and, where all have the same x, their mean as a thick one."""
    for x, y in zip(xs, ys):
        axis.plot(x, y, line, color=color, linewidth=0.6, alpha=0.5)
    if all(x == xs[0] for x in xs):
        axis.plot(xs[0], np.mean(ys, 0), line, color=color, linewidth=2, label=label)
    else:
        axis.plot([], [], line, color=color, linewidth=2, label=label)


def plot(path: Path, students: dict, runs: list[dict], samples: int) -> None:
    """Four panels: students during training, topics, the teacher's reward with its promotions, diversity."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    figure, ((curves, topics), (reward, diversity)) = pyplot.subplots(2, 2, figsize=(11, 7.5), layout="constrained")
    colors = pyplot.cm.tab20.colors  # dark and light in turn
    for color, (method, results) in zip(colors[::2] + colors[1::2], students.items()):
        results = sum(results, [])
        ys = [[100 / samples * np.mean(p["right"]) for p in result["points"]] for result in results]  # pass@1
        if len(ys[0]) == 1:  # nothing was trained
            curves.axhline(np.mean(ys), color=color, linestyle=":", linewidth=2, label=method)
        else:
            xs = [[p["step"] / r["points"][-1]["step"] * r["rollouts"] for p in r["points"]] for r in results]
            draw(curves, xs, ys, color, label=method)
    kinds = {"grounded": "tab:blue", "no-promotion": "tab:gray", "learnability": "tab:red"}
    for kind, color in kinds.items():
        group = [run for run in runs if run["kind"] == kind]
        # The budget is the students' completions: a step of the learnability teacher costs a tenth of a grounded one.
        logs, share = [run["log"] for run in group], lambda run, step: (step + 1) / len(run["log"]) * run["rollouts"]
        xs = [[share(run, row["step"]) for row in run["log"]] for run in group]
        if group:
            draw(diversity, [[share(run, step) for step in run["diversity"]["step"]] for run in group],
                 [run["diversity"]["vendi"] for run in group], color, label=kind)
        if group and kind != "learnability":  # whose reward is another quantity
            draw(reward, xs, [[row["reward"] for row in log] for log in logs], color, label=kind)
            for x, log in zip(xs, logs):
                up = [i for i, row in enumerate(log) if row["promotion"]]
                reward.plot([x[i] for i in up], [log[i]["reward"] for i in up], "^", color=color)
        if group and "topics" in logs[0][0]:
            for topic, line in zip(soar.TOPICS, ("-", ":", "--")):
                draw(topics, xs, [[100 * row["topics"][topic] for row in log] for log in logs], color, line, f"{kind}: {topic}")
    budget = "completions sampled by students"
    curves.set(title="Students during their training", xlabel=budget, ylabel="pass@1 on the hard test set, %")
    curves.set_xscale("symlog", linthresh=1000)
    curves.set_xticks([0, 1e3, 1e4, 1e5])
    topics.set(title="What the teachers write", xlabel=budget, ylabel="% of the problems", ylim=0)
    reward.set(title="The teacher's reward, and promotions (triangles)", xlabel=budget, ylabel="mean R")
    diversity.set(title="Diversity of a step's questions", xlabel=budget, ylabel="Vendi score")
    for axis in (curves, topics, reward, diversity):
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=8, loc="upper left" if axis is curves else "best")
    figure.savefig(path, dpi=110)


# ======== 6. Benchmark: where does the time go, and is our sampler worth its lines? ===================================

SHAPES = {  # vocabulary, width, MLP width, layers, heads, key/value heads of Qwen2.5-0.5B and -1.5B and of Llama-3.2-3B
    "random-0.5b": ("Qwen2Config", 151936, 896, 4864, 24, 14, 2), "random-1.5b": ("Qwen2Config", 151936, 1536, 8960, 28, 12, 2),
    "random-3b": ("LlamaConfig", 128256, 3072, 8192, 28, 24, 8)}


@dataclass
class Benchmark:
    # --- Benchmark: one process; all ways get the same model, prompts and limits, and take turns; medians
    benchmark: bool = False  # measure speed instead of runs
    parts: str = "sampling,update,step"  # what to time; the update's memory on a CPU shows only where it runs alone
    model: str = "tiny"  # tiny, a hub id, a folder, or random-0.5b, random-1.5b, random-3b: only their shapes, no download
    prompts: int = 8  # distinct prompts
    samples: int = 32  # completions of each
    tokens: int = 200  # new tokens at most (tiny: 24)
    prompt_tokens: int = 100  # tokens of a prompt (tiny: as its problems are)
    repeats: int = 3  # turns
    threads: int = 1  # torch's CPU threads
    micro_tokens: int = 4096  # padded tokens in one backward pass
    out: str = ""  # folder for benchmark.json; empty: none is written


def clock() -> float:
    """Wall seconds on a GPU; on a CPU the seconds of this process, which other programs disturb less."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def race(ways: dict, repeats: int) -> dict:
    """{name: way(turn) -> tokens made}; the first is ours -> tokens/s of each, and how many times faster ours was, by turn."""
    speeds = {name: [] for name in ways}
    for turn in range(-1 if torch.cuda.is_available() else 0, repeats):  # on a GPU turn -1 warms up and does not count
        for name, way in ways.items():
            start, tokens = clock(), way(turn)
            if turn >= 0:
                speeds[name].append(tokens / (clock() - start))
    ours = np.array(next(iter(speeds.values())))
    return {name: {"tokens/s": float(np.median(row)), "ours is faster by": float(np.median(ours / row))}
            for name, row in speeds.items()}


def benchmark_policy(flags: Benchmark, config: Config) -> Policy:
    """A real model, or random weights of a known shape with the tiny world's tokenizer."""
    if flags.model not in SHAPES:
        return soar.load_policy(soar.tiny_base_model(config) if flags.model == "tiny" else flags.model, config, Meter())
    import transformers
    kind, *sizes = SHAPES[flags.model]
    names = "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads".split()
    shape = getattr(transformers, kind)(**dict(zip(names, sizes)), tie_word_embeddings=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.device(device), tempfile.TemporaryDirectory() as folder:
        model = transformers.AutoModelForCausalLM.from_config(
            shape, dtype=torch.float32 if device == "cpu" else torch.bfloat16).eval()
        return Policy(model, None, soar.tiny_tokenizer(Path(folder)), "", "{problem}", False, soar.snapshot(model), Meter())


def end_half_early(model, prompts: list[list[int]], limit: int) -> None:
    """Make random ids EOS that are together ln(2) / limit of what the model samples, so half of the completions end early.

    The real EOS hardly ever follows prompts of random words, and never comes from random weights.
    """
    model.generation_config.eos_token_id = [-1]
    draw = torch.rand(4 * len(prompts), limit, generator=soar.seeded("calibrate")).to(model.device)
    tokens = soar.generate(model, prompts, 4, limit, 1.0, draw)[0]
    shares = (torch.bincount(tokens.flatten().cpu(), minlength=model.config.vocab_size) / tokens.numel()).tolist()
    chosen, total, target = [], 0.0, math.log(2) / limit
    for token in torch.randperm(len(shares), generator=soar.seeded("eos")).tolist():
        if total < target and shares[token] < target / 4:
            chosen, total = chosen + [token], total + shares[token]
    model.generation_config.eos_token_id = chosen


def benchmark_sampler(model, prompts: list[list[int]], flags: Benchmark) -> dict:
    """Useful tokens (up to EOS) a second, against transformers' generate without any filter; on a GPU also the roofline."""
    n, limit, T, c = flags.samples, flags.tokens, max(map(len, prompts)), model.config
    ids = torch.tensor([[0] * (T - len(p)) + p for p in prompts], device=model.device)  # [P, T], padded on the left
    mask = torch.tensor([[0] * (T - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    eos, lengths = torch.tensor(sorted(soar.eos_ids(model)), device=model.device), []

    def ours(turn):
        draw = torch.rand(len(prompts) * n, limit, generator=soar.seeded("benchmark", turn)).to(model.device)
        lengths.append(soar.generate(model, prompts, n, limit, 1.0, draw)[1])
        return lengths[-1].sum().item()

    def theirs(cache, turn):
        torch.manual_seed(turn + 1)
        new = model.generate(input_ids=ids, attention_mask=mask, do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
                             repetition_penalty=1.0, pad_token_id=0, num_return_sequences=n, max_new_tokens=limit,
                             cache_implementation=cache)[:, T:]  # [P*n, limit]
        ended = torch.isin(new, eos)
        return torch.where(ended.any(1), ended.int().argmax(1) + 1, new.shape[1]).sum().item()

    result = race({"soar.py": ours, "generate, dynamic cache": lambda turn: theirs(None, turn),
                   "generate, static cache": lambda turn: theirs("static", turn)}, flags.repeats)
    result["soar.py"]["ended early"] = torch.cat(lengths).lt(limit).double().mean().item()
    if torch.cuda.is_available():  # what a decode step must read, over the bandwidth of a copy (which reads and writes)
        x, y = (torch.empty(1 << 30, dtype=torch.uint8, device="cuda") for _ in range(2))
        y.copy_(x), (start := clock()), [y.copy_(x) for _ in range(10)]
        bandwidth, weights = 20 * x.nbytes / (clock() - start), sum(p.nbytes for p in model.parameters())
        head = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
        cache = 2 * c.num_hidden_layers * c.num_key_value_heads * head * model.dtype.itemsize  # bytes a token
        rows = [(len(prompts[i // n]), length) for i, length in enumerate(lengths[-1].tolist())]
        read = weights * max(length for _, length in rows) + cache * sum(p * k + k * (k - 1) // 2 for p, k in rows)
        result["soar.py"]["of the roofline"] = result["soar.py"]["tokens/s"] * read / bandwidth / sum(k for _, k in rows)
    return result


def full_logprobs(model, rollouts: list, temperature: float):
    """What completion_logprobs avoids: logits [B, T, V] of all positions at once."""
    T = max(len(r.prompt + r.completion) for r in rollouts)
    ids = torch.tensor([(r.prompt + r.completion + [0] * T)[:T] for r in rollouts], device=model.device)  # [B, T]
    logprobs = (model(input_ids=ids).logits.float() / temperature).log_softmax(-1)[:, :-1]  # [B, T - 1, V]
    logprobs = logprobs.gather(-1, ids[:, 1:, None])[..., 0]  # [B, T - 1]
    return torch.stack([row[len(r.prompt) - 1:len(r.prompt + r.completion) - 1].sum() for row, r in zip(logprobs, rollouts)])


def benchmark_update(policy: Policy, prompts: list[list[int]], flags: Benchmark, config: Config) -> dict:
    """Trained tokens a second and peak memory (of a CPU process: it can only grow, so the small ones come first)."""
    rng, state, chunked = random.Random(0), soar.adamw_state(policy.model), soar.completion_logprobs
    words = lambda: [rng.randrange(3, 100) for _ in range(rng.randint(flags.tokens // 4, flags.tokens))]
    rollouts = [soar.Rollout(prompt, words(), "", False) for prompt in prompts for _ in range(flags.samples)]

    def update(part, logprobs):
        if policy.model.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        with mock.patch.object(soar, "completion_logprobs", logprobs):
            rounding = soar.seeded("benchmark", device=policy.model.device)
            soar.policy_update(policy, part, torch.ones(len(part)), state, 1e-6, config, rounding)
        return sum(len(r.completion) for r in part)

    peaks = {}
    for name, part, way in (("soar.py, a quarter of the group", rollouts[::4], chunked), ("soar.py", rollouts, chunked),
                            ("full logits", rollouts, full_logprobs)):
        update(part, way)
        peaks[name] = soar.peak_memory_gb(policy.model.device)
    speeds = race({"soar.py": lambda _: update(rollouts, chunked), "full logits": lambda _: update(rollouts, full_logprobs)},
                  flags.repeats)
    return {name: {"peak GB": peak} | speeds.get(name, {}) for name, peak in peaks.items()}


def benchmark_step(policy: Policy, problems: list[Problem], config: Config) -> dict:
    """Seconds of one outer step by phase. Outside of the tiny world rewards and proposals are made up: there would be none."""
    seconds, reward, rng = Counter(), soar.student_reward, random.Random(0)

    def timed(phase, function):
        def run(*positional, **named):
            start = clock()
            result = function(*positional, **named)
            seconds[phase] += clock() - start
            return result
        return run

    with contextlib.ExitStack() as stack:
        patch = lambda where, name, function: stack.enter_context(mock.patch.object(where, name, function))
        if config.model != "tiny":
            patch(soar, "student_reward", lambda text, gold: reward(text, gold) * 0 + RIGHT * (len(text) % 2))
            patch(soar, "parse_problem", lambda text: rng.choice(problems))
        for name, phase in {"generate": "sampling", "completion_logprobs": "log-probs", "adamw_step": "optimizer",
                            "student_reward": "grading", "restore": "weight swaps", "snapshot": "weight swaps"}.items():
            patch(soar, name, timed(phase, getattr(soar, name)))
        patch(torch.Tensor, "backward", timed("backward", torch.Tensor.backward))
        state = soar.State(policy.base, soar.adamw_state(policy.model), policy.base)
        timed("all", soar.outer_step)(policy, problems, state, config)
    seconds["other"] = 2 * seconds["all"] - sum(seconds.values())
    return {phase: {"seconds": spent, "share": spent / seconds["all"]} for phase, spent in seconds.most_common()}


def benchmark(flags: Benchmark) -> None:
    """A table for each of --parts. Raises UserError."""
    if unknown := set(flags.parts.split(",")) - {"sampling", "update", "step"}:
        raise UserError(f"--parts {','.join(unknown)} does not exist; choose from sampling, update, step")
    if flags.threads:
        torch.set_num_threads(flags.threads)
    rng = random.Random(0)
    if flags.model == "tiny":
        config, flags.tokens = Config(**soar.PRESETS["tiny"], tau=math.inf), soar.PRESETS["tiny"]["student_tokens"]
        problems = [Problem(*soar.textbook_exercise(soar.make_world(0), rng)) for _ in range(flags.prompts)]
        hard = soar.hard_worksheets(soar.make_world(0), 64, 0)
    else:
        config = Config(dataset="made up", model=flags.model, n=flags.prompts, datasets=2, repeats=1, inner_steps=2, kl=0.0,
                        batch=flags.prompts, group=flags.samples, student_tokens=flags.tokens, teacher_tokens=flags.tokens,
                        micro_tokens=flags.micro_tokens, checkpointing=torch.cuda.is_available(), tau=math.inf)
        words = lambda: " ".join(rng.choices(soar.VOCABULARY[12:], k=flags.prompt_tokens))
        problems = hard = [Problem(words(), "5") for _ in range(flags.prompts)]
    policy = benchmark_policy(flags, config)
    prompts = [policy.student_prompt(problem)[-flags.prompt_tokens:] for problem in problems]
    if flags.model != "tiny":
        end_half_early(policy.model, prompts, flags.tokens)
    parts = {"sampling": lambda: benchmark_sampler(policy.model, prompts, flags),
             "update": lambda: benchmark_update(policy, prompts, flags, config),
             "step": lambda: benchmark_step(policy, hard, config)}
    result = {}
    for title in flags.parts.split(","):
        soar.restore(policy.model, policy.base)
        rows = result[title] = parts[title]()
        columns = list(dict.fromkeys(column for row in rows.values() for column in row))
        cells = [[name, *(f"{row[column]:.3g}" if column in row else "" for column in columns)] for name, row in rows.items()]
        print("\n" + markdown([[title, *columns], *cells]), flush=True)
    if flags.out:
        soar.write_json(Path(flags.out) / "benchmark.json", result | {"flags": dataclasses.asdict(flags)})


# ======== 7. Main: in which order does it happen? =====================================================================


def evaluate(folders: list[Path], settings: Settings) -> None:
    """Everything, from the run folders to eval.json. Raises UserError."""
    configs = [read_config(folder, settings) for folder in folders]
    dataset = settings.dataset or configs[0].dataset
    if len({config.dataset for config in configs}) > 1:
        raise UserError("the runs are of different data sets; evaluate them one data set at a time")
    wanted, kinds = chosen_methods(settings), {kind_of(config) for config in configs}
    for method in wanted:
        if METHODS[method][1] not in ("any", *kinds) and settings.methods != "all":
            raise UserError(f"--methods {method} needs a run of the kind {METHODS[method][1]}; given: {', '.join(kinds)}")
    students, questions, runs, seen = {}, {}, [], set()
    for folder, config in zip(folders, configs):
        run = open_run(folder, config, settings)
        task, rollouts = soar.fingerprint(run.train, run.test, config.model), student_rollouts(run)
        mine = [m for m in wanted if METHODS[m][1] == run.kind or METHODS[m][1] == "any" and task not in seen]
        seen.add(task)
        print(f"{folder}: {run.kind}, {len(run.train)} hard train and {len(run.test)} hard test problems, its students sampled "
              f"{rollouts:,} completions, {len(run.promotion_questions)} promotion questions"
              + f"; {run.dropped} problems of its own pool left out" * bool(run.dropped), flush=True)
        for method in mine:
            seeds = range(settings.seed, settings.seed + settings.seeds)
            students.setdefault(method, []).append([student(run, method, seed, settings) for seed in seeds])
            if about := about_questions(run, method, settings):
                questions.setdefault(method, []).append(about)
        runs.append({"folder": str(folder), "kind": run.kind, "log": run.log, "rollouts": rollouts,
                     "diversity": diversity_curve(run, settings) if settings.plot else {}})
    methods = {m: summary(students[m], dataset, settings.samples) for m in METHODS if m in students}
    about = {m: {name: nested([[entry[name]] for entry in entries]) for name in entries[0]} for m, entries in questions.items()}
    text = markdown(methods_table(methods, dataset)) + ("\n\n" + markdown(questions_table(about)) if about else "")
    out = Path(settings.out or folders[0])
    soar.write_json(out / "eval.json", {
        "settings": dataclasses.asdict(settings), "dataset": dataset, "methods": methods, "questions": about,
        "runs": [{name: run[name] for name in ("folder", "kind", "rollouts")} for run in runs]})
    soar.write_whole(out / "eval.md", lambda file: file.write_text(text + "\n"))
    if settings.plot:
        plot(out / "eval.png", students, runs, settings.samples)
    print(f"\nPercent of the hard test problems of {dataset}, mean ± SD over runs and seeds [the paper's figure]\n\n{text}\n\n"
          f"written: {out}/eval.json, {out}/eval.md" + f", {out}/eval.png" * settings.plot)


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv

    def work():
        if "--benchmark" in argv:
            parser = argparse.ArgumentParser(usage="python eval.py --benchmark [flags]", allow_abbrev=False)
            flags = Benchmark(**soar.parse_flags(parser, Benchmark, argv))
            soar.quiet_libraries()
            return benchmark(flags)
        runs, settings = parse_settings(argv)
        soar.quiet_libraries()
        evaluate([Path(run) for run in runs], settings)

    return soar.guarded("eval", work, Meter(), ["python", "eval.py", *argv])


if __name__ == "__main__":
    sys.exit(main())
