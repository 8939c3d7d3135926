"""The tests of soar.py and eval.py: `python -m pytest`. Each test's one line names the bug that it guards against.

They need no network and no GPU, and write to pytest's temporary folder only. The tiny world's base model is trained
once for all tests. The last test needs a real pretrained model: it is skipped unless the environment variable
SOAR_REAL_MODEL names the folder of one. Some tests want real problems: they are skipped unless SOAR_REAL_DATA names a
folder with math_test.jsonl, harp.jsonl and olympiadbench.jsonl (fields problem and answer).

For a class: `python test_soar.py --assignment A1 my_soar.py` writes a copy of soar.py with holes,
and `python test_soar.py --grade A1 my_soar.py` judges what was filled in.
"""

import argparse
import ast
import contextlib
import copy
import dataclasses
import doctest
import errno
import gzip
import http.server
import importlib.machinery
import importlib.util
import io
import itertools
import json
import math
import os
import random
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import types
import urllib.error
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent
HUB = tempfile.TemporaryDirectory()  # an empty hub cache, and no network: the same on every machine
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": HUB.name}


# ==================================================================================================
# Assignments: the file with holes, and its grade
# ==================================================================================================

# This part stands before the imports that take seconds, and ends the program when it is called as
# one: a grade runs in another process. That process imports the student's file under the name of
# soar, so that the tests below judge it as they judge soar.py, and may do to itself what it likes:
# loop, exit, print. It writes down what it begins and what comes out; the grader reads along.

# Assignment -> {a line of its score: the tests that judge it}. The first word is the function.
# Only tests that look at what comes out belong here: another right solution must pass.
ASSIGNMENTS = {
    "A1": {
        "rloo_advantages": """test_rloo_advantages_leave_one_out
            test_equal_rewards_give_exactly_zero test_rloo_gradient_is_unbiased_by_enumeration""",
        "pass_at_k": "test_pass_at_k_against_all_subsets",
        "learning_rate": "test_learning_rate",
    },
    "A2": {
        "parse_problem": """test_parse_problem test_parse_problem_against_its_definition
            test_parse_problem_takes_linear_time""",
        "student_reward": "test_student_reward",
    },
    "A3": {
        "pick_tokens": """test_pick_tokens_by_hand test_pick_tokens_at_the_ends
            test_greedy_equals_transformers test_sampling_frequencies
            test_sampling_equals_the_slow_way
            test_generate_reports_the_log_probabilities_of_its_tokens""",
        "completion_logprobs": """test_completion_logprobs_equal_full_logits test_eos_is_trained
            test_score_function_has_mean_zero""",
        "completion_logprobs without full logits": """test_completion_logprobs_equal_full_logits
            test_full_logits_never_exist""",
    },
    "A4": {
        "policy_update": """test_update_is_the_true_gradient_by_enumeration test_eos_is_trained
            test_flat_groups_stay_in_the_denominator test_micro_batches_do_not_change_the_gradient
            test_update_without_signal_changes_nothing test_update_moves_the_weights
            test_sampler_gap_shows_when_another_policy_was_sampled""",
        "rejection_gap": "test_rejection_gap",
        "kl_gap": "test_kl_gap",
    },
    "A5": {
        "median_student": "test_median_student",
        "promotion_due": "test_promotion_due",
        "promote": "test_promote_on_the_toy",
        "grounded_rewards": """test_grounded_rewards_on_the_toy test_inner_extra_on_the_toy
            test_champion_on_the_toy""",
        "outer_step": """test_outer_step_on_the_toy test_a_late_promotion_on_the_toy
            test_questions_on_the_toy test_teacher_on_the_toy""",
    },
    "A6": {},  # a report: nothing to fill in, and nothing that a program could judge
}

# What a docstring leaves open and other parts of the file rely on: comments over the holes.
HINTS = {
    "learning_rate": "The first step of the warm-up has peak / warmup, not 0.",
    "policy_update": "figures: grad_norm, kl (the mean of k1) and sampler_gap (the mean of\n"
    "sampler_gaps); all three 0.0 where there is no signal. adamw_step() takes the step.",
    "promote": "The row's keys: dataset, student, accuracy.",
    "grounded_rewards": "figures: each of train_student's, as the mean over all steps of all\n"
    "students, and accuracy_before.",
    "outer_step": "The row's keys: step, rewards, errors (lists of lists), reward (their mean),\n"
    "average (the moving one), promotion (promote's row or None), teacher (figures of propose and\n"
    "teacher_update), student (figures of the rewards), topics (in the tiny world: topic_shares).\n"
    "A row of state.questions: step, dataset, reward, question, answer.",
}

# Functions that an assignment adds behind its own.
ADDED = {
    "A4": '''
def rejection_gap(logits: Tensor, accepted: list[int], weights: Tensor) -> Tensor:
    """[A]: what an update lacks that treats redrawn actions as if nothing had been rejected.

    A policy over A actions, pi_0 = softmax(logits), is sampled until the action is in `accepted`;
    pi is the distribution of what comes out. The expected update is E[w_a grad ln pi_0(a)], a from
    pi. The gap is this less E[w_a grad ln pi(a)]. Gradients are those by the logits; weights [A].

    Proposition 1: with RLOO's weights, whose mean is zero, the gap is zero. (See propose().)
    """


def kl_gap(logits: Tensor, accepted: list[int], reference: Tensor, kl: float) -> Tensor:
    """[A]: where the KL term breaks Proposition 1.

    As before, but with the weights of policy_update: RLOO's advantages less kl * k1, where
    k1 = ln pi_0 - ln softmax(reference). The gap is the expected update less the gradient of
    E[reward] - kl * KL(pi, ref), where ref is the reference's distribution over `accepted`.
    """
''',
}

LIMIT = 30  # seconds for a test; each takes a second or two
IMPORT_LIMIT = 120  # seconds until torch and the student's file are imported


def with_holes(source: str, functions: set[str]) -> str:
    """The source in which these functions keep their docstring, and have nothing else in them."""
    lines = source.splitlines()
    for node in reversed(ast.parse(source).body):  # from the end: the lines before keep their place
        if isinstance(node, ast.FunctionDef) and node.name in functions:
            hint = HINTS.get(node.name, "").splitlines()
            hole = [f"    # {line}" for line in hint]
            hole.append(f'    raise NotImplementedError("{node.name}")')
            lines[node.body[0].end_lineno : node.end_lineno] = hole
    return "\n".join(lines) + "\n"


def assignment_source(name: str) -> str:
    """soar.py with the holes of an assignment, and with the functions that it adds."""
    functions = {label.split()[0] for label in ASSIGNMENTS[name]}
    source = (ROOT / "soar.py").read_text(encoding="utf-8")
    if name in ADDED:
        lines = source.splitlines()
        given = [node for node in ast.parse(source).body if getattr(node, "name", "") in functions]
        end = given[-1].end_lineno
        lines[end:end] = ["", *ADDED[name].splitlines()]
        source = "\n".join(lines)
    return with_holes(source, functions)


class Verdict:
    """A pytest plugin: notes which test begins, and keeps the first reason why one fails."""

    def __init__(self, tests: list[str], note: Callable):
        self.tests = tests
        self.note = note
        self.reason = ""

    def pytest_pycollect_makeitem(self, name):
        # Nothing is collected from other tests: that takes longer than to run these.
        return [] if name.startswith("test_") and name not in self.tests else None

    def pytest_runtest_logstart(self, nodeid, location):
        self.note("test", nodeid.split("::")[-1])

    def pytest_runtest_logreport(self, report):
        if report.failed and not self.reason:
            crash = getattr(report.longrepr, "reprcrash", None)
            text = crash.message if crash else str(report.longrepr)
            self.reason = f"{report.nodeid.split('::')[-1]}: {text}"

    def pytest_collectreport(self, report):
        if report.failed and not self.reason:
            errors = re.findall(r"^E +(.+)", str(report.longrepr), re.MULTILINE)
            self.reason = " ".join([*errors, "the tests cannot be collected"][:1])


def failure(tests: str, note: Callable = lambda *_: None) -> str:
    """Runs these tests on the module soar -> the first reason why one fails, or ''."""
    import pytest

    verdict = Verdict(tests.split(), note)
    nodes = [f"{Path(__file__).resolve()}::{test}" for test in tests.split()]
    # Without a terminal plugin pytest is silent; without capture no output can fill the disk.
    # (unraisableexception collects garbage twice, which takes longer than most of these tests.)
    options = ["-x", "-s"]
    for plugin in ("terminal", "cacheprovider", "faulthandler", "unraisableexception"):
        options += ["-p", f"no:{plugin}"]
    # A folder of its own: else pytest clears away what earlier sessions have left, on this time.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        options += [f"--rootdir={ROOT}", f"--basetemp={folder}/tests"]
        code = pytest.main([*options, *nodes], plugins=[verdict])
    return verdict.reason or ("" if code == 0 else f"pytest ended with code {int(code)}")


def judge(assignment: str, file: str, events: str, labels: list[str]) -> None:
    """In a process of its own: imports the student's file as soar, and writes down what it does.

    A line of `events` is a JSON pair: ("imported", ""), ("broken", reason), ("test", name) when a
    test begins, ("verdict", reason or "") at the end of each of the labels.
    """

    def note(kind: str, text: str = "") -> None:
        with open(events, "a", encoding="utf-8") as stream:
            stream.write(json.dumps([kind, text]) + "\n")

    loader = importlib.machinery.SourceFileLoader("soar", file)
    specification = importlib.util.spec_from_file_location("soar", file, loader=loader)
    module = importlib.util.module_from_spec(specification)
    sys.modules["soar"] = module
    try:
        loader.exec_module(module)
    except BaseException as error:  # sys.exit() as well
        note("broken", f"it cannot be imported: {type(error).__name__}: {error}")
        return
    note("imported")
    for label in labels:
        note("verdict", failure(ASSIGNMENTS[assignment][label], note))


def watch(process: subprocess.Popen, events: Path) -> str:
    """Waits until the process ends, or is ended since it writes nothing more -> what happened."""
    size = 0
    since = time.monotonic()
    while process.poll() is None:
        if events.stat().st_size != size:
            size = events.stat().st_size
            since = time.monotonic()
        limit = LIMIT if size else IMPORT_LIMIT
        if time.monotonic() - since > limit:
            process.kill()
            process.wait()
            return f"no end after {limit} s"
        time.sleep(0.05)
    return f"it ended the process (exit code {process.returncode})"


def grade(assignment: str, file: Path) -> dict[str, str]:
    """Label -> the first reason why it fails, in one line, or '' where it passes.

    A test that ends the process, or that is ended by the time limit, costs its label only: another
    process goes on with the next one.
    """
    reasons = {}
    labels = list(ASSIGNMENTS[assignment])
    while len(reasons) < len(labels):
        left = labels[len(reasons) :]
        with tempfile.TemporaryDirectory() as folder:
            events = Path(folder) / "events.jsonl"
            events.touch()
            command = [sys.executable, __file__, "--judge", assignment, file, events, *left]
            null = subprocess.DEVNULL
            process = subprocess.Popen(command, stdin=null, stdout=null, stderr=null)
            end = watch(process, events)
            noted = [json.loads(line) for line in events.read_text("utf-8").splitlines()]
        reasons |= zip(left, [text for kind, text in noted if kind == "verdict"])
        last, text = noted[-1] if noted else ("broken", f"while it was imported: {end}")
        if last == "broken":
            reasons |= dict.fromkeys(left, text)
        elif len(reasons) < len(labels):
            reasons[labels[len(reasons)]] = f"{text or 'before the first test'}: {end}"
    return {label: one_line(reason) for label, reason in reasons.items()}


def one_line(reason: str) -> str:
    """Short, and in letters that every console has."""
    lines = reason.strip().splitlines() or [""]
    return lines[0].encode("ascii", "backslashreplace").decode()[:200]


def assignments_main(argv: list[str]) -> int:
    """python test_soar.py --assignment A1 FILE, or --grade A1 FILE [--json] -> the exit code."""
    parser = argparse.ArgumentParser(
        description="Assignments about soar.py. (The tests themselves: python -m pytest)"
    )
    what = parser.add_mutually_exclusive_group(required=True)
    names = f"{min(ASSIGNMENTS)}-{max(ASSIGNMENTS)}"
    what.add_argument(
        "--assignment", nargs=2, metavar=(names, "FILE"), help="write soar.py with holes"
    )
    what.add_argument("--grade", nargs=2, metavar=(names, "FILE"), help="judge what was filled in")
    what.add_argument("--judge", nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--json", action="store_true", help="the grade for a program")
    given = parser.parse_args(argv)
    if given.judge:
        assignment, file, events, *labels = given.judge
        judge(assignment, file, events, labels)
        return 0
    name, file = given.assignment or given.grade
    if name not in ASSIGNMENTS:
        return complain(f"there is no assignment {name!r}; there are {', '.join(ASSIGNMENTS)}")
    if not ASSIGNMENTS[name]:
        return complain(f"{name} is a report: it has no holes, and people grade it")
    if given.assignment:
        return write_assignment(name, Path(file))
    if not Path(file).is_file():
        return complain(f"there is no file {file}")
    return print_grade(name, Path(file), given.json)


def complain(sentence: str) -> int:
    """A bad call: one sentence, exit code 2."""
    print(f"test_soar: {sentence}", file=sys.stderr)
    return 2


def write_assignment(name: str, file: Path) -> int:
    """The file with holes. What exists is never overwritten."""
    try:
        with open(file, "x", encoding="utf-8", newline="\n") as stream:
            stream.write(assignment_source(name))
    except FileExistsError:
        return complain(f"{file} exists; name a new file, or delete it")
    except OSError as error:
        return complain(f"{file} cannot be written: {error.strerror}")
    holes = dict.fromkeys(label.split()[0] for label in ASSIGNMENTS[name])
    print(f"{file}: write {', '.join(holes)}; then python test_soar.py --grade {name} {file}")
    return 0


def print_grade(name: str, file: Path, as_json: bool) -> int:
    """A line for each function, and the score."""
    reasons = grade(name, file.resolve())
    score = sum(not reason for reason in reasons.values())
    if as_json:
        row = {"assignment": name, "file": str(file), "score": score, "of": len(reasons)}
        print(json.dumps(row | {"failures": reasons}))
    else:
        width = max(map(len, reasons))
        for label, reason in reasons.items():
            print(f"{label:{width}}  {'failed: ' + reason if reason else 'passed'}")
        print(f"score: {score} of {len(reasons)}")
    return 0 if score == len(reasons) else 1


if __name__ == "__main__":
    sys.exit(assignments_main(sys.argv[1:]))


import mpmath  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES  # noqa: E402

import eval as eval_  # noqa: E402
import soar  # noqa: E402
from soar import (  # noqa: E402
    RIGHT,
    Config,
    Problem,
    Rollout,
    UserError,
    answers_equal,
    extract_boxed,
    parses,
    student_reward,
)

REAL_DATA = Path(os.environ.get("SOAR_REAL_DATA", "SOAR_REAL_DATA is not set"))
torch.set_num_threads(1)  # for models this small a second thread only waits
transformers.logging.disable_progress_bar()


# ======================================================================================================================
# Helpers
# ======================================================================================================================


def random_model(kind: str = "Llama", vocab: int = 32, eos=(1,), seed: int = 0, **settings):
    """Two layers, width 32, weights large enough that the next token is far from uniform."""
    torch.manual_seed(seed)
    settings = (
        dict(
            vocab_size=vocab,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            initializer_range=0.3,
            pad_token_id=0,
            bos_token_id=None,
            eos_token_id=list(eos),
        )
        | settings
    )
    config = getattr(transformers, kind + "Config")(**settings)
    soar.use_own_attention()  # as load_model() does
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def bare_policy(model, reference=None):
    """A policy for tests that need no text."""
    return soar.Policy(
        model, reference, None, "", "{problem}", False, soar.snapshot(model), soar.Meter()
    )


def small_config(**overrides) -> Config:
    """The tiny preset, with sizes for a test that stay when the preset is tuned."""
    sizes = dict(
        dataset="tiny",
        n=4,
        teacher_group=2,
        teacher_batch=1,
        kl=0.001,
        repeats=2,
        inner_steps=2,
        student_batch=4,
        student_group=4,
        steps=4,
        fail_k=8,
        window=1,
        reward_questions=8,
        student_lr=3e-3,
        teacher_lr=1e-3,
    )
    return Config(**soar.PRESETS["tiny"] | sizes | overrides)


PROCESS_COUNT = soar.process_count


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    """Other processes would not have a test's patches, and take seconds to start: only where --processes asks for them."""
    monkeypatch.setattr(
        soar,
        "process_count",
        lambda policy, config, jobs: PROCESS_COUNT(policy, config, jobs) if config.processes else 1,
    )


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def base(cache):
    """Folder of the tiny world's base model."""
    return soar.tiny_base_model(small_config(cache=str(cache)))


@pytest.fixture
def policy(base):
    return soar.load_policy(base, small_config(), soar.Meter())


def crowd_says(world, x: int, y: int) -> int:
    return soar.item_answer(world, "products", x, y, right=False)


def single_products(world) -> list[Problem]:
    """Worksheets of one misconceived product: the base model has them wrong, a few student steps get some right."""
    facts = sorted({pair for x, y in world for pair in ((x, y), (y, x))})
    return [Problem(soar.worksheet([f"{x}*{y}"]), soar.worksheet([x * y])) for x, y in facts]


def single_sums() -> list[Problem]:
    """Worksheets that the base model always has right."""
    return [
        Problem(soar.worksheet([f"{x}+{y}"]), soar.worksheet([x + y]))
        for x in range(4, 10)
        for y in range(4, 10)
    ]


def trained(policy, dataset, steps, config, key) -> list[torch.Tensor]:
    """The weights of a student that starts from the live model."""
    batches = soar.batches_of(dataset, steps, config.student_batch, soar.seeded(*key, "order"))
    soar.train_student(policy, batches, config, key)
    return soar.snapshot(policy.model)


def same(first, second) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def contents(folder: Path) -> dict:
    return {path: path.read_bytes() for path in sorted(Path(folder).rglob("*")) if path.is_file()}


def real_rows(name: str) -> list[dict]:
    """The rows of a real data set; skips the test where there is none."""
    path = REAL_DATA / f"{name}.jsonl"
    if not path.is_file():
        pytest.skip(f"SOAR_REAL_DATA names no folder with {path.name}")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def refused(capsys, argv, *words):
    """main() must say one sentence that contains `words` and end with code 2."""
    capsys.readouterr()
    assert soar.main(argv) == 2
    error = capsys.readouterr().err
    assert (
        error.startswith("soar: ")
        and error.count("\n") == 1
        and error.endswith("\n")
        and "Traceback" not in error
    )
    assert all(word in error for word in words), error


# ======================================================================================================================
# Config
# ======================================================================================================================


def test_flags_win_over_the_preset_and_the_preset_over_defaults():
    """A flag that equals the default must still beat the preset."""
    config = soar.parse_config(["--preset", "tiny", "--n", "64"])
    tiny = soar.PRESETS["tiny"]
    assert (config.n, config.tau) == (64, Config.tau)
    assert (config.inner_steps, config.repeats) == (tiny["inner_steps"], tiny["repeats"])
    assert config.inner_steps != Config.inner_steps
    config = soar.parse_config(["--dataset", "x/problems.jsonl", "--seed", "3", "--no-promotion"])
    assert (config.preset, config.out, config.promotion) == ("class", "runs/problems-3", False)
    paper = dataclasses.asdict(soar.parse_config(["--dataset", "math", "--preset", "paper"]))
    changed = {name for name, value in paper.items() if value != getattr(Config, name)}
    changed -= {"sample_tokens", "micro_tokens", "checkpointing"}  # memory: they change no result
    assert changed == {"dataset", "preset", "out", "teacher_batch"}  # and nothing else of Table 3


def test_presets_name_a_machine_and_fit_it(capsys):
    """A preset that does not fit its card: out of memory after an hour. Here the floor of it:
    weights, reference, a student's moments, and the gradients or the sampler's cache."""
    with pytest.raises(SystemExit):
        soar.parse_config(["--help"])
    screen = " ".join(capsys.readouterr().out.split())
    assert soar.MACHINES.keys() == soar.PRESETS.keys()
    assert all(machine in screen for machine in soar.MACHINES.values())
    # Weights, layers, key/value heads, head size and bytes a number:
    qwen = (494e6, 24, 2, 64, 4)  # Qwen2.5-0.5B in float32
    llama = (3213e6, 28, 8, 128, 2)  # Llama-3.2-3B in bfloat16
    sizes = {"class": qwen, "long": qwen, "paper": llama}
    for name, (weights, layers, heads, head, width) in sizes.items():
        card = int(re.search(r"(\d+) GB", soar.MACHINES[name])[1]) * 1e9
        config = soar.parse_config(["--dataset", "math", "--preset", name])
        resident = weights * (2 * width + 8)
        cache = config.sample_tokens * 2 * layers * heads * head * width
        assert resident + max(cache, weights * width) < 0.9 * card
        assert config.checkpointing


def test_every_field_has_help(capsys):
    """A flag without a word about it, or out of its group; a bare % would break --help."""
    fields = {entry.name: entry.metadata["help"] for entry in dataclasses.fields(Config)}
    assert all(fields.values())
    with pytest.raises(SystemExit) as end:
        soar.parse_config(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert end.value.code == 0
    for name, text in fields.items():
        assert re.search(soar.flag(name) + "[ ,]", shown) and " ".join(text.split())[:20] in shown
    order = [shown.index(title + ":") for title in soar.FLAG_GROUPS.values()]
    assert order == sorted(order)
    assert all(set(preset) <= set(fields) for preset in soar.PRESETS.values())
    assert set(soar.LEAST) <= set(fields)


@pytest.mark.parametrize(
    "argv, word",
    [
        (["--preset", "huge"], "--preset"),
        (["--steps", "0"], "--steps"),
        (["--teacher-group", "1"], "--teacher-group"),
        (["--student-group", "1"], "--student-group"),
        (["--temperature", "0"], "--temperature"),
        (["--student-lr", "nan"], "--student-lr"),
        (["--kl", "-1"], "--kl"),
        (["--reward", "vibes"], "--reward"),
        (["--dataset", "math", "--model", "tiny"], "tiny"),
        (["--model", "some/model"], "tiny"),
        (["--pool", "0"], "--pool"),
        (["--pool", "1000000000"], "--pool"),
        (["--threads", "1000000"], "--threads"),
        (["--dataset", "", "--model", "x"], "--dataset"),
        (["--tau", "nan"], "--tau"),
        (["--kl", "nan"], "--kl"),
        (["--clip", "inf"], "--clip"),
    ],
)
def test_bad_values(argv, word):
    """Values that cannot work must be refused before hours of sampling. NaN passes every comparison with a bound."""
    with pytest.raises(UserError, match=word):
        soar.parse_config(argv)


def test_generators_depend_on_all_of_their_key():
    """Two students with the same random numbers would be one student."""
    keys = [
        (0, "student", 0, 0),
        (0, "student", 0, 1),
        (0, "student", 1, 0),
        (1, "student", 0, 0),
        (0, "propose", 0),
    ]
    draws = [torch.rand(4, generator=soar.seeded(*key)).tolist() for key in keys]
    assert len({tuple(draw) for draw in draws}) == len(keys)
    assert draws[0] == torch.rand(4, generator=soar.seeded(*keys[0])).tolist()


# ==================================================================================================
# Verifier: a table of cases, hostile texts, and properties over real answers
# ==================================================================================================

# A row is an answer and other ways to write it (==), or an answer and wrong ones (!=).
CASES = r"""
# integers, decimals, thousands: the five spellings of 15,600 beside lists and tuples
5 == 5.0
-0 == 0
033 == 33
0.5 == \frac{2}{4}
{{{8}}} == 8
5,\!460 == 5460
10{,}000 == 10^4
111, \! 111 == 111111
251, 750, 000 == 251750000
1e-3 == 0.001
\hspace{.05in}7 == 7
1\,000 == 1000
\frac13. == \frac{1}{3}
0.\overline{3} == 1/3 == 0.\overline{33} == .\overline{3}
0.1\overline{6} == 1/6 == \frac{1}{6}
2.\overline{142857} == 15/7
0.3333333333333333 == 1/3
3.141592653589793 == \pi
1e-3 == 10^{-3} == 1\times10^{-3} == 1 \cdot 10^{-3} == 1/1000 == 1E-3
6.02 \times 10^{23} == 6.02*10^23 == 602000000000000000000000 == 6.02e23
1234567 == 1,234,567 == 1\,234\,567 == 1{,}234{,}567 == 1,\!234,\!567 == 1 234 567 == $1,234,567$
1234567 == 1234567.0 == 1,234,567.00
\frac{1}{21,000} == 1/21000
+5 == 5 == +5.0
--5 == 5
2*-3 == -6 == 2(-3) == 2 \cdot (-3)
5.0 \times 10^3 == 5000
1.25 == 1\frac14 == 5/4 == 125\%
1,000,000 == 10^6 == 1 \text{ million} == 1000000
3.0 == 3 == 3.
-1,\ \ 2 == 2,-1
e == e^1 == \exp(1)
0 == 0.0 == 0/5
3-2-1 == 0
5 != 5.001
0 != 10^{-50}
0.28 != 28
4 != 4\sqrt2
45 != 4 5
32349 != 32, 349
7 != 1,7
0.\overline{3} != 0.3 != 0.33 != 3/10
3.14 != \pi
0.33 != 1/3
6.02 \times 10^{23} != 6.02 \times 10^{22} != 6.02 != 6.2e23
1234567 != (1,234,567) != 1;234;567 != 1.234567 != 234567
5 != 5 5 != 55 != 5,5 != 5! != -5 != 5x != 5= != =5 != (5 != 5) != 5+ != ++ != x
4 5 != 20 != 9
10 != 0 != 100 != 1 0
3.5 != 3\frac{5}{1}
1.25 != 12.5 != 1.2 != 1.3
\frac{10^{50}+1}{10^{50}} != 1
0 != 1 != \emptyset
3.1415926536 != \pi
0.333333333333 != 0.33333
5\,6 != 30 != 56

# matrices: a column is not a row, nor a matrix the list of its cells
\begin{pmatrix}1&2\\3&4\end{pmatrix} == \begin{bmatrix} 1 & 2 \\ 3 & 4 \end{bmatrix}
\begin{pmatrix}1&2\\3&4\end{pmatrix} == \begin{bmatrix}1&2\\3&4\end{bmatrix}
\begin{pmatrix}1&2\\3&4\end{pmatrix} == \begin{pmatrix} 1 & 2 \\ 3 & 4 \\ \end{pmatrix}
\begin{pmatrix}1&2\\3&4\end{pmatrix} == \left(\begin{array}{cc}1&2\\3&4\end{array}\right)
\begin{pmatrix}1&2\\3&4\end{pmatrix} == \begin{pmatrix}1.0&2\\3&\frac82\end{pmatrix}
\begin{pmatrix}1&2\\3&4\end{pmatrix} == \begin{matrix}1&2\\3&4\end{matrix}
\begin{pmatrix}1\\2\end{pmatrix} == \begin{pmatrix} 1 \\ 2 \end{pmatrix}
\begin{pmatrix}1\\2\end{pmatrix} == \begin{bmatrix}1\\2\end{bmatrix} == (1,2)
\begin{pmatrix}1/2\\-\frac13\end{pmatrix} == \begin{pmatrix}\frac12\\-1/3\end{pmatrix}
\begin{bmatrix}0&-1\\1&0\end{bmatrix} == \begin{pmatrix}0&-1\\1&0\end{pmatrix}
\begin{bmatrix}0&-1\\1&0\end{bmatrix} == \left[\begin{array}{cc}0&-1\\1&0\end{array}\right]
\begin{pmatrix}1&2\\3&4\end{pmatrix} != \begin{pmatrix}1&3\\2&4\end{pmatrix}
\begin{pmatrix}1&2\\3&4\end{pmatrix} != \begin{pmatrix}1&2\\3&5\end{pmatrix}
\begin{pmatrix}1&2\\3&4\end{pmatrix} != \begin{pmatrix}1&2&3&4\end{pmatrix}
\begin{pmatrix}1&2\\3&4\end{pmatrix} != \begin{pmatrix}1\\2\\3\\4\end{pmatrix} != (1,2,3,4) != 10
\begin{pmatrix}1\\2\end{pmatrix} != \begin{pmatrix}1&2\end{pmatrix}
\begin{pmatrix}1\\2\end{pmatrix} != \begin{pmatrix}2\\1\end{pmatrix} != 1,2
\begin{bmatrix}0&-1\\1&0\end{bmatrix} != \begin{bmatrix}0&1\\-1&0\end{bmatrix}

# words, letters: case and layout are free, the word is not
\text{(C)} == C
\text{Odd} == odd
\text{Even} == even == \text{even} == \mathrm{even} == \textbf{even}
\text{(C)} == (C) == \text{C} == \textbf{C} == C. == \textbf{(C)} == \mathrm{(C)}
\text{I only} == I only == \text{I}\text{ only}
\text{I and II} == I and II == I, II
\text{Monday} == Monday == \text{ Monday}
\text{no solution} == no solution == No solution == \text{No solution}
\text{Yes} == yes == Yes
MAKE == \text{MAKE}
\text{S,Q,M} == S, Q, M
\text{all real numbers} == all real numbers
\text{True} == True == true
\text{A} == (A) == A
AB == BA
\text{undefined} == undefined == Undefined
\text{none} == none == None
\text{No} == No == no == NO
\text{increasing} == increasing
(B) == B == \text{B}
\mathrm{B} == B
\(\text{S,Q,M}\) == S, Q, M
\boxed{\text{Even}} == even
\text{more than }45 != 45
12\text{ or more} != 12
\text{more than }45\% != 45\%
\text{I only} != \text{II only}
\text{odd} != \text{oddd}
A != a
\text{even} != \text{odd} != 2 != e
C != D != \text{(D)} != c
\text{I only} != I
\text{Monday} != \text{Sunday}
\text{Yes} != \text{No} != no
ACF != AFC != \text{CAF}
\text{S,Q,M} != \text{Q,S,M} != M,Q,S
12\text{ or more} != 12 or fewer
\text{at least }5 != 5
\text{more than }3 != 3
\text{A} != B != AB != 1
\text{none} != 0 != one
AB != ab
N != n
\text{increasing} != decreasing

# times, units, money, percent, degrees, bases: free beside none, kept apart, scaled on one side
\$32,\!348 == 32348
\$1,234.50 == 1234.5
\textdollar .10 == 0.1
28\% == 28 percent
10\% == 0.1
90^\circ == 90
5\text{ inches} == 5 \text{ in}
15\mbox{ cm}^2 == 15
17\text{ any text} == 17
45 mph == 45
12 square units == 12
9.8\text{ m/s}^2 == 9.8
5\text{ cents} == 5 cents
204_5 == 204_{5}
204_{5} == 204
\cos 60^\circ == \frac12
25\% == 25% == 25 percent == 25\text{ percent} == 25 == 0.25 == 1/4 == 25 \% == \frac14
25\% == 25 percentage == 25.0\%
12.5\% == 1/8 == 12\frac12\% == 0.125
33\frac13\% == \frac{1}{3} == 33 \frac{1}{3} percent == \frac{100}{3}\%
\frac{100p}{100+p}\% == \frac{100p}{100+p} == \frac{p}{100+p}
45^\circ == 45^{\circ} == 45° == 45 degrees == 45\text{ degrees} == \frac{\pi}{4} == 45\degree
\cos 45^\circ == \frac{\sqrt2}{2} == \cos(45^{\circ}) == \cos \frac{\pi}{4} == \cos(\pi/4)
180^\circ-2x == 180^{\circ} - 2x == 180° - 2x
\$5 == 5 == 5 dollars == \$5.00 == 5\text{ dollars} == \textdollar 5 == \text{\$}5 == $5
15\text{ cm}^2 == 15 == 15 \mathrm{~cm}^2 == 15 cm^2 == 15 cm² == 15\text{ square centimeters}
15\text{ cm}^2 == 15 \text{cm}^{2} == 15\ \text{cm}^2
60 mph == 60 miles per hour == 60\text{ mph} == 60\text{ miles per hour} == 60
5 m == 5\text{ m} == 5
7\text{ hours} == 7 hours == 7 hr == 7
3.2\text{ m/s}^2 == 3.2
36\text{ million} == 36000000 == 36 million == 3.6 \times 10^7
4:30 \text{ p.m.} == 4:30 PM == \text{4:30 p.m.} == 4:30 pm
1011_2 == 1011_{2} == 1011
12_8 == 12_{8}
\frac{1}{2}\text{ cm} == 0.5 cm == 1/2
\frac{\pi}{2}\text{ radians} == \frac\pi2
\tan(60^\circ) == \sqrt3
\sec 60° == 2
100\% == 1 == 100
$\$10$ == 10 == \$10.00
10\text{ dollars} == \$10
\text{5 cm} == 5
5\,\mathrm{cm} == 5
5~\text{cm} == 5
5\mbox{ cm} == 5
5\ \text{cm}^3 == 5
5\operatorname{cm} == 5
12 \text{ square units} == 12 sq. units == 12
4\sqrt{3}\text{ cm}^2 == 4\sqrt3
11:00 == 11
1 degree == 1°
7 percent == 0.07
7% == 7 percentage
3" == 3 inches
16'' == 16 in
2 billion == 2\times10^9
\frac{3}{4}" == 0.75 in
0.0011_{2} == 0.0011
7% == 7
12_8 != 12_7
5\text{ cents} != \$5
20\text{ degrees} != 20\text{ dollars}
36\text{ million} != 36
9\text{ a.m.} != 9\text{ p.m.}
25\% != 0.25\% != 2500\% != 2.5 != 0.0025 != 24\% != 25\pi
\frac{100p}{100+p}\% != \frac{p}{100+p}\% != \frac{100p}{100+p^2}\%
45^\circ != 45\pi != 46^\circ != \pi/3 != 0.45
\$5 != 5 cents != \$6 != 50
15\text{ cm}^2 != 15\text{ m}^2 != 16 cm^2 != 15 inches
7\text{ hours} != 7\text{ minutes} != 7 pm
2\text{ hours }30\text{ minutes} != 60 != 30 != 2
4:30 pm != 4:30 am != 2:15 pm != 4:31 pm != 8:60 pm
2:06 PM != 1:03 PM
1011_2 != 1011_3 != 11 != 1101_2
12_8 != 10
10_2 != 10_3
2:06 != 1:03
30 degrees != 30\text{ inches}
7 percent != 7 inches
7% != 7 inches
1 dollar != 1 cent
5 dollars != 5 cents
3" != 3 cm
7 percent != 7 pounds
5 dollars != 5 days
5 dollar != 5 days
30 degrees != 30 days

# labels and equations: a name is free, terms move, a factor is free; 7=11a+c is not 11a+c
x=9 == 9
x = 1/2 == x=0.5
y=2x+3 == 2x+3
34x+45y=100 == 100-45y=34x
(p,q)=(3,2) == (3,2)
a= 56 ,b= 54 == b=54, a=56
x=1,y=2 == (1,2)
x=-5, p=\frac{14}{3} == -5, \frac{14}{3}
(x,y,z)=(1,2,3) == (1,2,3) == x=1,y=2,z=3 == x=1,\ y=2,\ z=3
x=1,y=2 == y=2,x=1 == x=1 \text{ and } y=2 == x = 1, y = 2
x=5 == 5 == x = 5 == 5=x == x=5.0 == \text{x}=5 == x-5=0
y=2x+3 == y = 3+2x == 2x-y+3=0 == y-2x=3 == -y+2x+3=0
x^2+y^2=1 == y^2+x^2=1 == 2x^2+2y^2=2 == x^2+y^2-1=0 == 1=x^2+y^2
34x+45y-20z+100=0 == -34x-45y+20z-100=0 == 34x+45y=20z-100
f(x)=x^2 == x^2 == f(x) = x^{2}
V_1:V_2=11:21 == 11:21 == V_{1} : V_{2} = 11 : 21
|AB|=1 == 1
\angle ABC=30^\circ == 30 == 30^\circ == \angle ABC = 30
AB=5 == 5
\text{Area}=12 == 12 == Area = 12 == A=12
\sin\theta=\frac12 == \frac12
\frac{AB}{CD}=3 == 3
a_n=2n+1 == 2n+1 == a_{n}=1+2n
k=\frac13 == \frac13
P(x)=x+1 == x+1
T_n = n^2 == n^2
n=2,3,4 == 2,3,4
c=a == a=c
3 = x == x=3
x=2\text{ or }x=-3 == x=-3, x=2 == 2,-3 == x \in \{2,-3\}
x=2, y=-3 == (2,-3) == y=-3, x=2 == (x,y)=(2,-3)
(x,y)=(1,2) == x=1,y=2
y=\frac{x}{2} == x=2y == x/2 == 2y=x
y = -x == x+y=0 == -x
x^2 = 4y == y = \frac{x^2}{4} == 4y-x^2=0
\frac{x^2}{4}+\frac{y^2}{9}=1 == 9x^2+4y^2=36
f(x)=2x+1 == 2x+1 == f(x) = 1 + 2x
S = 4\pi == 4\pi
\angle A = 60^\circ == 60
\theta = \frac{\pi}{3} == \frac{\pi}{3} == \pi/3
a = 3, b = 4 == b=4, a=3 == (3,4) == a=3,\ b=4 == a=3;b=4 == a=3 \text{ and } b=4
x=1\pm i == 1+i,1-i
p\left(x\right)=x+1 == x+1
f(2)=5 == 5
x=\boxed{5} == 5
x\approx5 == 5
x≈5 == 5
m_{\max}=n^2-n-1 == n^2-n-1
a=b == b-a=0
4x-5y=-50 == y=\frac{4x+50}{5}
4=5=6 != 6
x=5 != y=5
7=11a+c != 11a+c
10x-4y=20 != 10x-5y=20
f(x)=x+1 != f(x)=x-1
a= 56 ,b= 54 != a=54, b=56
a= 56 ,b= 54 != a=56
a= 56 ,b= 54 != a=56, b=54, c=1
a= 56 ,b= 54 != 54, 56
x=1,y=2 != (2,1)
x=1 != x=1x
x=50 != 0.5\%
4=5 != 6=7
x=1,y=2 != x=2,y=1 != y=1,x=2 != 2,1 != x=1 != x=1,y=2,z=3
x=5 != x=6 != x=-5 != 6 != x>5 != x^2=25 != 2x=5
y=2x+3 != y=2x-3 != 2x+3=0 != x=2y+3 != y=3x+2 != y>2x+3 != y^2=2x+3
x^2+y^2=1 != x^2-y^2=1 != 1 != x^2+y^2 != x^2+y^2=2 != (x^2+y^2)^2=1
x=0 != x^2=0 != 0=1
f(x)=x^2 != f(x)=x^3 != g(x)=x^2
n=2,3,4 != n=1,2,3
a^2+b=0 != 0 != b
4=5=6 != 4 != 5
x=2, y=-3 != (-3,2) != x=-3,y=2
x^2 = 4y != y^2=4x != x^2=-4y
\frac{x^2}{4}+\frac{y^2}{9}=1 != \frac{x^2}{9}+\frac{y^2}{4}=1
a = 3, b = 4 != a=4,b=3 != (4,3)
a=b != a=-b

# intervals and inequalities: open is not closed; -x>-1 is x<1
[-2,7] == x \in [-2,7]
-2 \le x \le 7 == x \in [-2,7]
x<1 \text{ or } x>3 == (-\infty,1)\cup(3,\infty)
5 \ge x == x \leq 5
-x>-1 == x<1
0\leq y\leq \pi == y \in [0,\pi]
0 < x < \infty == x > 0
(-\infty,3] == x\le3 == x \leq 3 == 3\ge x == x<=3 == x \in (-\infty,3] == (-∞, 3]
(-\infty,3] == \left(-\infty, 3\right] == -\infty<x\le3 == \{x|x\le3\} == \{x : x \leq 3\}
[0,1) == 0\le x<1 == x\in[0,1) == 1>x\ge0 == \left[0,1\right) == 0 \leq x < 1
(1,\infty) == (1,+\infty) == x>1 == 1<x == (1, ∞)
x>1 == -x < -1 == x-1>0 == 1-x<0 == 2x>2
(-\infty,1)\cup(3,\infty) == (3,\infty)\cup(-\infty,1) == x \in (-\infty,1)\cup(3,\infty)
(-\infty,1)\cup(3,\infty) == x<1, x>3 == (-∞,1)∪(3,∞)
x\neq3 == x \ne 3 == 3\neq x == x != 3 == x-3\neq0
(-\infty,\infty) == \mathbb{R} == x\in\mathbb{R} == (-\infty, +\infty)
a>b == b<a
x+y\le 5 == 5\ge x+y == y+x \leq 5
[\frac12,\infty) == x \ge 0.5 == [0.5, +\infty)
(-\infty,-1)\cup(-1,1)\cup(1,\infty) == (-\infty, -1) \cup (-1, 1) \cup (1, \infty)
\{ x \mid x > 2 \} == (2,\infty) == x>2
\{x \in \mathbb{R} : x > 2\} == x>2
1 < x < 5 == (1,5) == x \in (1,5) == 5>x>1 == 1<x<5
-2 \le x \le 2 == [-2,2]
n \ge 3 == [3,\infty) == 3 \leq n
m\neq 2 == m \ne 2
x \in (2, \infty) == (2,\infty)
\mathbf{x}+\mathcal{y}+\boldsymbol{z}+\vec{u}+\overline{v}+\mathbb{N} == x+y+z+u+v+N
(0,infinity) == x>0
x ∈ (0,1) == 0 \lt x \lt 1
x \gt 5 == 5 \lt x
x \leqslant 5 == 5 \geq x
x \geqslant 5 == x >= 5
\{x \in \mathbb{R} : x > 2\} == (2,\infty)
1<2x+1 == 2x+1>1
a\le b == b-a\ge0
x>5 != x\ge5
(-\infty,1)\cup(3,\infty) != (-\infty,1)
(-\infty,1) != (\infty,1)
x<1 != x>-1
f(2)<f(1)<f(4) != f(1)<f(2)<f(4)
(-\infty,3] != (-\infty,3) != [3,\infty) != x<3 != x\ge3 != (-\infty,-3] != (\infty,3]
(-\infty,3] != [-\infty,4]
[0,1) != [0,1] != (0,1) != (0,1] != [0,2) != 0<x<1 != [1,0)
x>1 != x<1 != x\ge1 != y>1 != x>-1 != 1 != x>2
(-\infty,1)\cup(3,\infty) != (1,3) != (-\infty,1]\cup[3,\infty) != (-\infty,3)\cup(1,\infty)
x\neq3 != x=3 != x\neq4 != 3 != y\neq 3
a>b != a<b != a\ge b
x+y\le 5 != x+y\ge5 != x+y<5 != x+y=5
(-\infty,-1)\cup(-1,1)\cup(1,\infty) != (-\infty,\infty)
1 < x < 5 != 1 \le x < 5 != [1,5] != (1,4) != 1<y<5
2<3 != 3>2
\infty != 10^{99}
(1,\infty) != (1,-\infty)
1/\infty != 0
a\le b != b\le a
a\neq b != a=b
x\le5 != x\in[5,\infty)
3 < x > 1 != (3,\infty)

# tuples: ordered, of one length, in round brackets
(1,\frac{9}{2}) == \left( 1, 4.5 \right)
(0,2),(4,23) == (4,23), (0,2)
(2,251,252) == (2, 251, 252)
(1,2) == (1, 2) == ( 1 , 2 ) == (1.0,2) == \langle 1,2\rangle == (x,y)=(1,2)
(1,2) == \begin{pmatrix}1\\2\end{pmatrix} == (\frac22,2) == (1,2).
(1,2),(3,4) == (3,4),(1,2) == \{(1,2),(3,4)\} == (1,2) and (3,4) == (1,2);(3,4) == (1, 2), (3, 4)
(-3,\frac{\pi}{2}) == (-3, \pi/2) == \left( -3, \frac{\pi}{2} \right)
(0,-\sqrt2) == (0,-2^{1/2})
(a,b) == (a, b)
（1，2） == (1,2)
\left( \frac{1}{2}, 3 \right) == (0.5,3)
(3,4)\text{ or }(4,3) == (4,3),(3,4)
\langle 1,-2,3\rangle == (1,-2,3) == \begin{pmatrix}1\\-2\\3\end{pmatrix}
(1,2) != (2,1)
(1,2) != [1,2]
(1,2)+(3,4) != (1,2,3,4)
(2,251,252) != 2251252 != (2251252) != (2, 252, 251) != (251, 252)
(1,2) != \{1,2\} != (1,2,3) != (1,3) != (1.2) != 12 != (1,2] != \begin{pmatrix}1&2\end{pmatrix}
(1,2) != (-1,2) != (1)
(1,2),(3,4) != (2,1),(4,3) != (1,2) != (1,4),(3,2) != (1,2,3,4) != 1,2,3,4
(a,b) != (b,a) != a,b

# lists and sets: in any order, each item once; ± is two items
15,600 == 15600
1000,99 == 1000.99
0,1 == 1, 0
1, 2 and 3 == \{3,2,1\}
19, 46, \text{ and } 82 == 19,46,82
\pm 2021 == -2021, 2021
1 \pm \sqrt{19} == 1-\sqrt{19}, 1+\sqrt{19}
12,500 == 12500 == \$12,500 == 12500 dollars == \$12{,}500.00 == \$ 12500
3,14 == 3.14
70,110 == 70, 110 == 110, 70
1,2,3 == 3, 2, 1 == \{1,2,3\} == 1, 2, 3 == 1, 2 and 3 == 1, 2, and 3 == 1,2,\text{ and }3
1,2,3 == \{ 3,1,2 \} == 1;2;3 == \left\{1,2,3\right\} == x=1,2,3 == x=1, x=2, x=3 == x \in \{1,2,3\}
1,2,3 == 1 \text{ or } 2 \text{ or } 3 == {1, 2, 3} == 2, 3, 1
\pm 5 == 5,-5 == -5, 5 == \{-5,5\} == x = \pm 5 == x=5,-5 == x=5 \text{ or } x=-5
1\pm\sqrt5 == 1+\sqrt5,1-\sqrt5 == 1+\sqrt{5} \text{ and } 1-\sqrt{5}
\{1\pm\sqrt{5},-2\} == -2, 1+\sqrt5, 1-\sqrt5 == \{-2,1-\sqrt5,1+\sqrt5\}
\frac{-1\pm\sqrt3 i}{2} == \frac{-1+i\sqrt3}{2}, \frac{-1-i\sqrt3}{2}
\emptyset == \varnothing == ∅ == \{\} == \{ \}
0,1 == 1,0
\{5\} == 5
\left\{\frac12,3\right\} == \{3,0.5\}
\{a,b\} == \{b,a\} == a,b
\{(1,2),(2,3)\} == (2,3),(1,2)
2,4,6,8 == 2, 4, 6, 8 == \{8,6,4,2\}
\sqrt{2},\sqrt{3} == \sqrt3, \sqrt2
3, \frac12 == 0.5, 3
\pm\frac{\sqrt2}{2} == \frac{\sqrt2}{2},-\frac{\sqrt2}{2} == \pm\frac{1}{\sqrt2}
\pm 3i == 3i,-3i
2\pm\sqrt3 == 2+\sqrt3,2-\sqrt3 == 2-\sqrt{3},2+\sqrt{3}
10\text{ or }12 == 12, 10
12 \text{ or } 13 == 13,12
0.5\text{ or }1 == 1, \frac12
2,3 != 2.3
1,234 != 1.234
1,2 != (1,2)
1,1,2 != 1,2
1,2,3 != 1,2,3,...
\pm 2 != 2
1;260 != 1,260
12\text{ or fewer} != 12
3,1 != 3.1
70,110 != 70 != 71110
1,2,3 != 1,2 != 1,2,3,4 != 1,2,4 != 123 != 1,2,3,\ldots != 1,2,2,3 != (1,2,3) != [1,2,3] != 1+2+3
1,2,3 != 3
\pm 5 != 5 != -5 != \pm 4 != 5,5
\{1\pm\sqrt{5},-2\} != 1+\sqrt5,-2 != \{1\pm\sqrt{5},2\} != \{1\pm\sqrt{5}\}
\emptyset != 0 != \{0\}
0,1 != 1 != 0.1 != 0 != 10
2,4,6,8 != 2,4,6 != 2,4,6,9 != 2468
3, \frac12 != 3.5 != 3\frac12
2\pm\sqrt3 != 2+\sqrt3 != 2\pm\sqrt2 != 3\pm\sqrt2

# ratios
2:3 == 2 : 3
2:3 == 2/3 == \frac23 == 4:6 == 2\colon3
3:4:5 == 6:8:10 == 3 : 4 : 5
\sqrt3:2 == \frac{\sqrt3}{2}
3:5 != 5:3
2:3 != 3:2 != 2:4 != 23 != 2.3
3:4:5 != 3:5:4 != 5:4:3 != 3:4

# complex numbers
\frac{\sqrt2}{2}(21-20i) == \frac{21\sqrt2}{2}-10\sqrt2 i
3+4i == 4i+3 == 3 + 4 i == 3+4\cdot i == 3 + 4\mathrm{i}
3+4i == 4i+3 == 3 + 4 i == (2+i)^2
i == \sqrt{-1} == i^5
\frac{1}{i} == -i
e^{i\pi} == -1
2i\sqrt3 == 2\sqrt3i == 2\sqrt{3}i == \sqrt{-12}
|3+4i| == 5
\frac34 i == \frac{3i}{4} == 0.75i
3+\sqrt{2}i == 3+i\sqrt2
3+4i != 3-4i != 4+3i != 7 != 3+4 != 3,4 != (3,4)

# formulas: compared at points of both signs, near and far
(x-1)(x+1) == x^2-1
x^2+2*x+1 == (x+1)**2
\sin 2x + 1 == 1+\sin(2x)
\exp(2x) == e^{2x}
\tan^2(y)+1 == \sec^2(y)
|t|\sqrt{1+t^2} == \sqrt{1+t^2}|t|
\lceil n/2\rceil+1 == \lceil (n+2)/2 \rceil
\binom{2n}{n} == \frac{(2n)!}{n!n!} == \frac{(2n)!}{(n!)^2} == {2n \choose n}
x^2-1 == x^2 - 1 == -1+x^2 == (x+1)(x-1) == x^{2}-1 == x*x-1 == x²-1
\frac{x+2}{7} == \frac{x}{7}+\frac{2}{7} == (x+2)/7 == \frac17(x+2)
(n-2)2^n+1 == (n-2) 2^{n}+1 == 2^n(n-2)+1 == n2^n - 2^{n+1} + 1
\frac{(n-4)180}{n} == \frac{180(n-4)}{n} == 180 - \frac{720}{n} == 180(1-\frac4n)
2\sin x\cos x == \sin 2x == \sin(2x) == 2 \cos x \sin x
\sin^2 x+\cos^2 x == 1
\tan x == \frac{\sin x}{\cos x}
\sec^2 x - 1 == \tan^2 x
\arctan x == \tan^{-1} x == \arctan(x)
|x-3| == |3-x| == \left|x-3\right| == \lvert x-3\rvert
\lfloor \frac{n}{2} \rfloor == \left\lfloor n/2 \right\rfloor
\lceil n/2\rceil == -\lfloor -n/2\rfloor
\sqrt{ab} == \sqrt{a}\sqrt{b} == \sqrt{ba} == (ab)^{1/2}
\frac{a}{\sqrt b} == \frac{a\sqrt b}{b}
\ln(ab) == \ln a + \ln b
x^{1/2} == \sqrt x == \sqrt{x}
\sqrt[3]{x} == x^{1/3} == x^{\frac13}
\frac{1}{x} == x^{-1} == 1/x
e^{2x} == (e^x)^2
2^{n+1} == 2\cdot2^n == 2(2^n)
a_1+a_2 == a_{1}+a_{2} == a_2+a_1
n! == n(n-1)!
\theta+1 == 1+\theta
3xy == 3yx == 3 x y == 3x \cdot y
\frac{1}{2}bh == \frac{bh}{2} == bh/2 == 0.5bh
-x+2 == 2-x
(x+y)^2 == x^2+2xy+y^2
\frac{x^2-y^2}{x-y} == x+y
k\pi == \pi k
x^{2}y^{-1} == \frac{x^2}{y}
f(x) == f( x )
a+bi == bi+a
x²+y² == x^2+y^2
x₁+x₂ == x_1+x_2
\frac{1}{x+1} == (x+1)^{-1}
-\frac{1}{2x} == -\frac1{2x} == \frac{-1}{2x}
2 \sin b \cos a == \sin(a+b)-\sin(a-b) == 2\cos a\sin b
\cos^2\theta == 1-\sin^2\theta == (\cos\theta)^2
\frac{2}{3}\pi r^3 == \frac{2\pi r^3}{3}
\pi r^2 == r^2\pi
\lvert x \rvert == |x|
0.5x == \frac{x}{2}
\frac{7}{2}x^2 == 3.5x^2
\left\lfloor \frac{n}{3} \right\rfloor == \lfloor n/3 \rfloor
n^2+n == n(n+1)
\frac{n(n+1)}{2} == \binom{n+1}{2} == 1/2 n (n+1)
2^n-1 == 2^{n}-1 == -1+2^n
(-1)^n == (-1)^{n+2}
3(x+2)(x-1) == 3x^2+3x-6
x^3 - 3x^2 + 9x - 9 == x^3-3x^2+9x-9
-(x-1) == 1-x
a(b+c) == ab+ac
\frac{a+b}{c} == \frac ac+\frac bc == (a+b)/c
\sqrt{x^2+1} == (x^2+1)^{1/2} == \sqrt{1+x^2}
\frac{1}{\sqrt{x}} == x^{-1/2} == \frac{\sqrt x}{x}
sin(x)+cos(x)+tan(x)+arcsin(x) == \arcsin x+\tan x+\cos x+\sin x
arccos(x)+arctan(x) == \arctan x+\arccos x
2×3·4⋅5∗x == 120x
2 thousand == 2000
\alpha\beta\gamma\delta\epsilon\theta\lambda\mu == \mu\lambda\theta\epsilon\delta\gamma\beta\alpha
\rho\sigma\phi\Phi\omega == \omega\Phi\phi\sigma\rho
2RC+R+C == R+C+2CR
\log_ba == \frac{\ln a}{\ln b}
3\sec\frac12\theta == \frac{3}{\cos(\theta/2)}
\csc x == \frac{1}{\sin x}
\cot x == \frac{\cos x}{\sin x}
\sinh x == \frac{e^x-e^{-x}}{2}
\cosh x == \frac{e^x+e^{-x}}{2}
\tanh x == \frac{\sinh x}{\cosh x}
2^{-(2k+1)} == \frac{1}{2\cdot4^k}
(n+1)! == (n+1)n!
x^{-1} == 1/x
(x^2)^3 == x^6
2/3x == \frac23x
f\left(2\right) == f(2)
2^-1x == \frac{x}{2}
\text{245 yd.} == 245
2^{100}(x-1)-(x-2) != 2^{100}(x-1)-(x-2)+1
\frac{y_3-y_1}{x_3-x_1} != 1
2n_1 != 2n
x^2-1 != x^2+1
|x| != x
\lfloor\frac{2n-1}{5}\rfloor != \lfloor\frac{2n}{5}\rfloor
\binom{2n}{n} != \binom{2n}{n-1} != \frac{2n}{n} != \binom{n}{2n}
x^2-1 != x^2 != (x-1)^2 != 1-x^2 != x^3-1 != y^2-1 != 2x-1 != x^2-x
\frac{x+2}{7} != x+\frac27 != \frac{x}{7}+2 != \frac{7}{x+2}
\sin 2x != 2\sin x != \sin x != \sin^2 x != \cos 2x
\arctan x != \tan x != \frac{1}{\tan x} != \cot x
|x+3| != x+3 != -x-3 != |x|+3 != |x-3|
|x+100| != x+100
\lfloor n/30\rfloor != \lfloor n/40\rfloor != n/30 != \lceil n/30\rceil
\lceil n/2\rceil != \lfloor n/2\rfloor
\sqrt{a+b} != \sqrt a+\sqrt b
2^{n+1} != 2^n+1 != 2^n
a_1 != a_2 != a
n! != n != (n-1)! != n^2
\theta != \phi
xy != x+y != x/y
f(x) != f(y) != g(x) != f
f'(x) != f(x)
x != X
a+bi != a-bi != a+b
x+ != x- != x
\frac{1}{x+1} != \frac1x+1
1/2x != \frac{2}{x}
\pi r^2 != 2\pi r != \pi r
\lfloor\frac{2n-1}{5}\rfloor != \lfloor\frac{2n-2}{5}\rfloor
n^2+n != n^2-n != n(n-1) != n^2+1
(-1)^n != (-1)^{n+1}
\frac{a+b}{c} != a+\frac bc != \frac{a}{c}+b
\sqrt{x^2+1} != x+1 != \sqrt{x^2-1}
f(2) != 2f
-f(-y) != f(y)
28 percentage != 28 inches
x_1 != x_2
\sqrt{x} != -\sqrt{x}
\sqrt{-x} != \sqrt{x}
x^2 != |x|
|xy| != xy
|x-y| != x-y
(2n)! != 2n!
x^{2^3} != x^6
7 percentage != 7 pounds

# fractions and mixed numbers
\frac43 == \dfrac{4}{3}
\frac{270}7 == 270/7
-\frac12 == \frac{-1}{2}
{-}4 == -4
6\frac15 == 31/5
4 4/9 == 40/9
33 \frac{1}{3} == \frac{100}{3}
1/2 == 0.5 == \frac{1}{2} == \frac12 == \dfrac 12 == .5 == 0.50 == 50\% == 1/2. == $\frac{1}{2}$
1/2 == \(\frac{1}{2}\) == \frac{2}{4} == 2^{-1} == \frac1{2} == \frac{1}2 == ½ == {1}/{2}
1/2 == \left(\frac{1}{2}\right) == 1 / 2 == \tfrac{1}{2} == x=\frac12 == \boxed{\frac12}
1/2 == \sqrt{1/4} == \sqrt{0.25} == \sin 30^\circ == \cos\frac{\pi}{3} == \displaystyle\frac{1}{2}
-\frac{3}{4} == -3/4 == \frac{-3}{4} == \frac{3}{-4} == -0.75 == -.75 == - \frac34 == −3/4
-\frac{3}{4} == {-}\frac{3}{4} == -\dfrac{3}{4}
2\frac{3}{5} == 13/5 == 2.6 == 2 3/5 == 2\,\frac35 == \frac{13}{5} == 2\dfrac{3}{5} == 2 \frac 35
2\frac{3}{5} == 2 + \frac{3}{5}
-1\frac12 == -1.5 == -\frac32 == -3/2
2½ == 5/2 == 2 1/2
\frac{3}{4} == 0.7500 == 75\% == 3:4
\frac{10}{3} == 3.\overline{3} == 3\frac13 == 3.3333333333333335
1/3 == 0.333333333333
$\displaystyle\frac12$ == 0.5
\big(\Big(\bigg(\Bigg(5\quad\qquad\;\:\!\Bigg)\bigg)\Big)\big) == 5
\cfrac12+\tfrac12 == 1
8/2/2 == 2
\frac{1}{12} != 0.0833333333
\frac13 != 0.33
4 4/9 != 4
4 4/0 != 4
1\frac{11}{10} != 1.1
1/2 != 2/1 != 0.05 != 5 != 1 != -1/2 != 12 != 1,2 != (1,2) != 0.51 != \frac{1}{3} != \frac12\pi
-\frac{3}{4} != 3/4 != -4/3 != -0.7 != -\frac34i
2\frac{3}{5} != 6/5 != 23/5 != 2 != \frac{3}{5} != 2.35
-1\frac12 != -0.5 != 1.5
2½ != 1 != 21/2
1/3 != 0.3333

# numbers: roots, powers, logarithms, factorials, roundings, and what is none
\sqrt{8} == 2\sqrt2
\frac{1}{\sqrt{10}} == \frac{\sqrt{10}}{10}
\sqrt[3]{16} == 2\sqrt[3]{2}
2^{2005} == 2 \cdot 2^{2004}
\log_2 8 == 3
(\sqrt2)^{-2} == \frac12
\frac{\sqrt3}{3} \approx 0.577 == \frac{1}{\sqrt3}
\sqrt{8} == 2\sqrt{2} == \sqrt 8 == 8^{1/2} == 2*\sqrt{2} == 2 \cdot \sqrt{2} == \frac{4}{\sqrt2}
\sqrt{8} == \sqrt8 == √8 == 2√2 == sqrt(8) == 2sqrt(2) == 2*sqrt(2) == 8^{0.5} == 2^{3/2} == 2^{1.5}
\sqrt{8} == 2 \sqrt {2}
\frac{\sqrt{3}}{3} == \frac{1}{\sqrt3} == \sqrt{3}/3 == \sqrt{\frac13} == 3^{-1/2} == \frac13\sqrt3
\frac{\sqrt{3}}{3} == \frac{\sqrt 3}3 == 1/\sqrt{3} == \tan 30^\circ
\sqrt[3]{16} == 16^{1/3} == 2 \cdot 2^{1/3}
\sqrt{2}+\sqrt{3} == \sqrt{3}+\sqrt{2} == \sqrt{5+2\sqrt{6}}
1+\sqrt{2} == \sqrt2+1 == \frac{1}{\sqrt2-1}
\sqrt[3]{-8} == -2
-2\sqrt[3]{2} == \sqrt[3]{-16}
3\sqrt{13} == \sqrt{117} == 3 \sqrt{13}
\sqrt{3\sqrt{3}} == 3^{3/4} == \sqrt[4]{27}
2\pi == 2π == 2*pi == 2 \cdot \pi == 2pi == \pi \cdot 2 == 2 \pi == \pi + \pi == 360^\circ
\frac{\pi}{4} == \pi/4 == \frac14\pi == 0.25\pi == \frac{1}{4} \pi
e^2 == e^{2} == \exp(2) == \exp 2 == e \cdot e
\ln 8 == 3\ln 2 == \log 8 == \ln(8) == \ln{8}
\log_2 8 == \log_{2}8 == \log_2(8) == \frac{\ln 8}{\ln 2}
\log_{10} 100 == 2
\frac{\ln 3}{\ln 2} == \log_2 3 == \log_2{3}
2^{10} == 1024 == 2^10 == 2**10 == 4^5 == 1,024
2^{2005} == 4 \cdot 2^{2003}
5! == 120 == 5 \cdot 4! == 5\cdot 4\cdot3\cdot2
\binom{5}{2} == 10 == \dbinom52 == {5 \choose 2} == \binom52 == \frac{5!}{2!3!}
\frac{2004!}{2003!} == 2004
2^{3^2} == 512
-2^2 == -4
(-2)^2 == 4
10^{-2} == 0.01
\sin^{-1}\frac12 == \frac{\pi}{6} == \arcsin(1/2) == 30^\circ
3\times10^{-4} == 0.0003
\sin\left(\frac{\pi}{6}\right) == 0.5
4^{\frac{1}{2}} == 2
(\sqrt{2})^2 == 2
1.5\times 10^{1} == 15
10^{1/3} == \sqrt[3]{10}
2^{-1/2} == \frac{1}{\sqrt{2}}
2^{100} == 1267650600228229401496703205376
7! == 5040 == 5,040
\log_{2} 3 == \frac{\log 3}{\log 2} == \log_2(3)
\ln 2 == \log 2 == \ln(2) == \ln{2}
\frac{e^2-1}{2} == (e^2-1)/2
5! \cdot 2 == 240
3 + 2\sqrt{2} == (1+\sqrt{2})^2
6\pi\sqrt{2} == 6\sqrt2\pi
5\text{ } == 5
\frac{1}{7}\triangle ABC == \frac{ABC}{7}
\tbinom{4}{2} == 6
ln(8) == 3 log(2)
6\div2 == 3
6÷2∕3 == 1
\text{13} == 13
\log_{10} 2 == \frac{\ln 2}{\ln 10}
\lceil 2.1\rceil == 3
\lfloor -2.1\rfloor == -3
\lfloor\log_2 8\rfloor == 3
-3^2 == -9
2^{-1}3 == 1.5
2-(3-1) == 0
2^3\frac12 == 4
2^3^2 == 512
\lfloor\frac{\ln 1000}{\ln 10}\rfloor == 3
\lfloor\frac{\ln 125}{\ln 5}\rfloor == 3
\lfloor(\sqrt{6})^2\rfloor == 6
\frac{1}{2004!} != \frac{1}{2006!}
\log 2 != \log_{10} 2
(3) != (3]
\cos 45 != \frac{\sqrt2}{2}
\sqrt{8} != 8 != 2 != 4\sqrt2 != \sqrt{2} != 2\sqrt3 != \sqrt[3]{8} != -2\sqrt2 != 2.83 != 2,\sqrt2
\frac{\sqrt{3}}{3} != \frac{\sqrt{3}}{2} != \sqrt3 != \frac{3}{\sqrt3} != \frac{\sqrt{3}}{3}i
\sqrt[3]{16} != \sqrt{16} != 3\sqrt{16} != 2\sqrt{2}
1+\sqrt{2} != 1-\sqrt{2} != \sqrt{3} != -1+\sqrt2
2\pi != \pi != 2 != \pi^2 != 6.28 != 2\pi r
e^2 != 2e != 7.39
\log_2 3 != \log_3 2 != \log 3
\log_{0} 5 != 0
\log_1 5 != 0
2^{10} != 2^{11} != 20 != 210 != 10^2
2^{2005} != 2^{2004} != 2^{2005}+1 != 2^{2005}-1
\binom{5}{2} != \frac52 != 20 != \binom{5}{1}
2^{100} != 1267650600228229401496703205377
10^{-100} != 0
\log 0 != -\infty
2^3^2 != 64
5\quad 6 != 30 != 56
\quad != \,
"""


def rows_of(table: str) -> list[tuple[bool, list[str]]]:
    """(equal, [answer, other, ...]) for each row."""
    rows = []
    for line in table.splitlines():
        if line and not line.startswith("# "):
            equal = " == " in line
            rows.append((equal, line.split(" == " if equal else " != ")))
    return rows


ROWS = rows_of(CASES)
PAIRS = [(equal, row[0], other) for equal, row in ROWS for other in row[1:]]

CODE = [
    "__import__('os').system('touch pwned')",
    "exec('5')",
    "eval('5')",
    "x.__class__.__mro__",
    "lambda x: x",
    "5; import os",
    "open('pwned', 'w')",
    "().__class__.__bases__[0]",
    "print(5)",
    "5 if True else 6",
    "`touch pwned`",
    "%(5)s",
    "5#6",
    "5//1",
    "5&4",
    "5|1",
    "~-5",
    "5<<1",
    "int('5')",
    "__builtins__",
    "globals()",
    "f'{5}'",
    "'5'",
    "5 and __import__",
    r"\input{/etc/passwd}",
    r"\write18{ls}",
    r"\def\x{5}\x",
    r"\newcommand{\a}{5}\a",
    r"\csname 5\endcsname",
    r"\catcode`5",
    "sympy.Integer(5)",
    "Integer(5)",
    r"\sin.__class__",
    "<script>5</script>",
    "../../5",
    r"\url{5}",
]
SIZES = [
    "9**9**9**9",
    "9^{9^{9^{9}}}",
    "9^9^9^9",
    "1000000000!",
    "((((3!)!)!)!)!",
    "3!!!!!!",
    "99999!!",
    "1e999999999",
    "1e9999",
    "10^{10^{10}}",
    "2^{100000}",
    r"\binom{1000000}{500000}",
    r"\binom{3000}{1500}!",
    "(10^{4000})!",
    "x!" + "!" * 300,
    "(10^{4000})^{(10^{4000})}",
    r"\exp(\exp(\exp(\exp(9))))",
    r"\pi^{\pi^{\pi^{\pi^{\pi}}}}",
    r"\sqrt{2^{16000}+1}",
    "(" + "9" * 380 + ")^{1/3}",
    "(" + "9" * 380 + ")^{9999}",
    "1/" * 199 + "1",
    "1/" * 400 + "1",
    "1." + "3" * 395,
    "5" * 399,
    "5" * 999,
    "5" * 100_000,
    "0." + "0" * 390 + "5",
    r"\sin(10^{9000})",
    r"\tan 90^\circ",
    r"\cos(10^{4000}i)",
    r"\log 0",
    "1/0",
    "0/0",
    "0^{-1}",
    r"\infty-\infty",
    r"\infty/\infty",
    r"0\cdot\infty",
    r"1^{\infty}",
    r"(-1)^{\infty}",
    "i^{i^{i^i}}",
    "(-1)!",
    "(1/2)!",
    "i!",
    r"\infty!",
    r"\lfloor i\rfloor",
    r"\lfloor\infty\rfloor",
    r"\sqrt[0]{5}",
    r"\sqrt[1000000000]{5}",
    r"\log_1 5",
    r"\log_{-1}5",
    r"\arcsin 10^{99}",
    r"\binom{-1}{-1}",
    r"\binom{1/2}{3}",
    r"\binom{5}{10^{9}}",
    r"\frac{1}{x-x}",
    r"\frac{x}{0}",
    "x^{x^{x^{x^x}}}",
    "x!!!!",
    "2^{2^{2^{2^x}}}",
    "x" + "^x" * 150,
    "x" + "^x" * 400,
    "x" + "^{x" * 25 + "}" * 25,
    r"\lfloor " * 30 + "x" + r"\rfloor " * 30,
    "*".join(["2^{9999}"] * 45),
    "*".join(["2^{9999}"] * 100),
    "+".join(["2^{9999}"] * 45),
    "*".join(["3000!"] * 60),
    "+".join(["1/3000!"] * 50),
    r"\sum_{i=1}^{10^9} i",
    r"\int_0^1 x dx",
    r"\lim_{x\to0}x",
]
NESTS = [
    "(" * 20_000,
    "(" * 20_000 + "5" + ")" * 20_000,
    "(" * 199 + "5" + ")" * 200,
    "{" * 400 + "5" + "}" * 400,
    "[" * 150 + "5" + "]" * 150,
    "|" * 900,
    "|" * 399,
    "|x" * 150,
    "-" * 999 + "7",
    "-" * 399 + "7",
    "+" * 300,
    "!" * 399,
    "5" + "!" * 300,
    r"\frac" * 150,
    r"\frac" * 80,
    r"\sqrt" * 150 + "5",
    r"\sqrt" * 70 + "5",
    "√" * 399 + "5",
    "\\log " * 49 + "5",
    r"\sin" * 90 + "5",
    "^" * 300,
    "5" + "^" * 300,
    "_" * 300,
    "x" + "_x" * 150,
    "x" + "_{x" * 60 + "}" * 60,
    r"\boxed{" * 5000,
    r"\text{" * 60 + "5" + "}" * 60,
    r"\begin{pmatrix}" * 20 + "5",
    r"\\" * 200,
    "&" * 399,
    "\\!" * 400,
    "," * 399,
    "5," * 199,
    ",".join(r"\sqrt{%d}" % n for n in range(2, 40)),
    "=".join("x" * 100),
    "x=" * 150 + "5",
    "<".join("x" * 100),
    "5=5=5",
    "4=5",
    "0=0",
    "5<6",
    r"\pm" * 300,
    "±" * 399,
    "5" + "±5" * 150,
    ":" * 300,
    "5:" * 150 + "5",
    "5 " * 190,
    "5%" * 190,
    "°" * 399,
    r"\%" * 190,
    "$" * 399,
    "?" * 300,
    "." * 399,
    "5" + "." * 300,
    '"' * 900,
    "''" * 190,
    "5,5",
    "5,4,3",
]
PATTERNS = [
    "a" * 399,
    "a" * 399 + "!",
    "a " * 199,
    "aaaa " * 79,
    "Aa" * 190,
    "A" + " a" * 190 + "=",
    "1," * 199,
    "1,000" * 70,
    "1,000," * 65,
    "1 000 " * 60,
    "0" * 398 + ":",
    "0:" * 190,
    "1:00 " * 70,
    r"\text{ " * 80,
    r"\text{" + "a " * 190,
    r"\hspace{" * 50,
    "{-}" * 130,
    "{,}" * 130,
    r"\overline{" * 39,
    "." * 200 + r"\overline{3}",
    "1" * 150 + "." + "1" * 150 + r"\overline{" + "1" * 80,
    r"\left|" * 60,
    "|a" * 190 + "|",
    r"\approx" * 50,
    r"\circ^" * 60,
    r"^{\circ" * 50,
    "and or " * 50,
    r"\{x|" * 90,
    r"\{ x " * 70,
    "f(" * 190,
    "f(" * 90 + ")" * 90,
    "P(a," * 90,
    "1e" * 190,
    "1e9" * 130,
    "x" * 150 + "y" * 150,
    "\\" * 399,
    r"\a" * 199,
    "apples " * 57,
    "1 1/" * 99,
]
STRANGE = [
    "٥",
    "⁵",
    "₅",
    "Ⅴ",
    "五",
    "½½½",
    "²",
    "∞∞",
    "∑",
    "√√√",
    "\u202e5",
    "5\u200b",
    "\u200b5",
    "5\u0301",
    "\ufeff5",
    "é",
    "ﬁ",
    "ﷺ" * 20,
    "ﷺ" * 399,
    "\u0130",
    "🙂" * 300,
    "\x00",
    "5\x00",
    "\x005",
    "\x1b[31m5",
    "\ud800",
    "5\udfff",
    "\udc00" * 99,
    "∎",
    "∎5",
    "5∎",
    "⟦5⟧",
    "′",
    "f′′",
    "α" * 200,
    "×5",
    "÷",
    "∅∅",
    "",
    " ",
    "\n",
    "~" * 399,
    " " * 399,
    "\u2028",
    "5\u20286",
    "5\x1c6",
    "5\x856",
    "5\u30006",
]
HOSTILE = {"code": CODE, "sizes": SIZES, "nests": NESTS, "patterns": PATTERNS, "strange": STRANGE}

BOXES = [
    (r"\boxed{1} and \boxed{2}", "2"),
    (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
    (r"\fbox{7}", "7"),
    ("7", None),
    (r"\boxed{1} then \boxed{2", "1"),
    (r"\boxed{1} \boxed{}\boxed{ }", "1"),
    (r"\boxed{\{1,2\}}", r"\{1,2\}"),
    (r"} \boxed {3} {", "3"),
    (r"\boxed{\left\{ x \right.}", r"\left\{ x \right."),
    (r"\boxed{1 \boxed{2}}", "2"),
    ("\\boxed{\n\\begin{pmatrix}1\\\\2\\end{pmatrix}\n}.", r"\begin{pmatrix}1\\2\end{pmatrix}"),
]

REWARDS = [
    (r"so \boxed{7}", 120),
    (r"\boxed{x=7}", 120),
    (r"\boxed{8}, no, \boxed{7}", 120),
    (r"\boxed{7}, no, \boxed{8}", 20),
    (r"\(7\) or \boxed{8}", 20),
    (r"$x=7$ \boxed{8}", 20),
    (r"\boxed{8}", 10),
    (r"7 \boxed{8}", 10),
    ("$7$", 0),
    (r"$7$" + "$1$" * 10 + r"\boxed{8}", 10),
    (r"$7$" + "$1$" * 9 + r"\boxed{8}", 20),
    (r"\boxed{7", 0),
    (r"$7$ \boxed{ }", 0),
    ("", 0),
]

PARSES = [
    "5",
    r"\frac{3}{4}",
    "x^2+1",
    "(1,2)",
    "a= 56 ,b= 54",
    "[0,1)",
    r"\$5",
    r"5\text{ cm}",
    "C",
    r"x \in [0,1]",
    r"\pm 3",
]
PARSES_NOT = [
    "hello world",
    "",
    " ",
    r"\frac{",
    "4=5=6",
    "x+",
    "x^",
    "2 3",
    r"\text{hello}",
    "(1,2",
    r"\foo",
    "1,,x+",
    "()",
]


@pytest.mark.parametrize("equal, row", ROWS, ids=[row[0][:40] for _, row in ROWS])
def test_cases_equal_and_unequal_both_ways(equal, row):
    """Each row guards a way of writing; what each group guards is written over it."""
    for other in row[1:]:
        verdicts = answers_equal(other, row[0]), answers_equal(row[0], other)
        assert verdicts == (equal, equal), other


FORBIDDEN = {"exec", "compile", "import", "open", "os.system", "os.exec", "subprocess.Popen"}
AUDITED = []  # what Python did of these, from "begin" on


def audit(event: str, _) -> None:
    if AUDITED and event in FORBIDDEN:
        AUDITED.append(event)


sys.addaudithook(audit)
with contextlib.suppress(ImportError):  # Python 3.12 loads this when it first meets a long number
    importlib.import_module("_pylong")


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_texts_run_nothing_and_are_refused_quickly(kind):
    """A model can write anything: none of it may be executed, take a second, raise, or be right."""
    for text in HOSTILE[kind]:
        AUDITED.append("begin")
        start = time.process_time()
        for gold in ("5", "x+1", r"\sqrt2", "1,2", "(1,2)", "x>5", "55"):
            assert not answers_equal(text, gold) and not answers_equal(gold, text), (
                text[:60],
                gold,
            )
        parses(text)
        extract_boxed(text)
        student_reward(text, "5")
        student_reward(rf"\boxed{{{text}}}", "5")
        taken = time.process_time() - start
        events = AUDITED[1:]
        AUDITED.clear()
        assert taken < 1 and not events, (text[:60], taken, events)


@pytest.mark.parametrize("text, content", BOXES)
def test_extract_boxed(text, content):
    """A scan for the last opening finds an unclosed or blank box instead of the last good one."""
    assert extract_boxed(text) == content


def test_boxes_take_linear_time():
    """Scanning on from each opening is quadratic: a degenerate completion would hang the run."""
    start = time.process_time()
    assert extract_boxed(r"\boxed{" * 20_000) is None
    assert extract_boxed(r"\boxed{" * 20_000 + "5" + "}" * 20_000) == "5"
    assert student_reward(r"\boxed{" * 20_000 + "8" + "}" * 20_000, "5") == 10.0
    assert time.process_time() - start < 3


@pytest.mark.parametrize("completion, reward", REWARDS)
def test_student_reward(completion, reward):
    """The partial reward is for the last formulas and boxes: a list of guesses must not pay."""
    assert soar.student_reward(completion, "7") == reward


def test_parses():
    """What the teacher's answers must pass: mathematics throughout, and no words."""
    assert [text for text in PARSES if not parses(text)] == []
    assert [text for text in PARSES_NOT if parses(text)] == []


def test_worksheets_of_any_length():
    """The label of the fifth item, e=, read as Euler's number: a seventh of what the teacher wrote
    was thrown away, and hard problems were graded by their spelling."""
    world, rng = soar.make_world(0), random.Random(0)
    for _ in range(300):
        sheet, answer = soar.textbook_exercise(world, rng)
        items = [item.strip() for item in answer.split(",")]
        assert parses(answer) and len(items) == sheet.count("=")
        assert answers_equal(" , ".join(reversed(items)), answer) and answers_equal(
            answer.replace(" ", ""), answer
        )
        label, number = items[-1].split("=")
        assert not answers_equal(",".join([*items[:-1], f"{label}={int(number) + 1}"]), answer)
        assert len(items) == 1 or not answers_equal(",".join(items[:-1]), answer)
    assert (
        answers_equal("d=4, e=5", "e=5, d=4")
        and answers_equal("e=5", "5")
        and not answers_equal("e=5", "e")
    )
    assert answers_equal("z=i", "i") and not answers_equal("e^2=5", "5")


def test_the_steps_print_what_the_section_says():
    """The page is taught from: its example must be what the three steps do."""
    tokens = soar._tokens(soar._respell(r"\left( \dfrac12, 5\text{ cm} \right)"))
    assert " ".join(tokens) == r'( \frac { 1 } { 2 } , 5 "cm )'
    trees = soar._read(tokens)
    assert trees == [("()", (r"\frac", "1", "2"), ('"cm', "5"))]
    assert ("(0.5; 5.0)", set()) in soar._spellings(trees)


def test_a_student_can_add_a_rule(monkeypatch):
    """The exercise: 0.1(6) is a product until one line is added beside that of \\overline."""

    def verdicts():
        soar._readings.cache_clear()
        return [
            answers_equal("0.1(6)", other) for other in (r"\frac16", "0.1666666666666667", "0.6")
        ]

    assert verdicts() == [False, False, True]
    rule = r"(\d*)\.(\d*)\((\d+)\)", soar._repeating  # 0.1(6) -> {0.10+6/90}
    monkeypatch.setattr(soar, "_RULES", [rule, *soar._RULES])
    assert verdicts() == [True, True, False]
    assert [pair for pair in PAIRS if answers_equal(*pair[1:]) != pair[0]] == []
    soar._readings.cache_clear()


def test_verdicts_depend_on_the_two_texts_alone():
    """Not on earlier calls, the precision that others set, or how deep the caller's stack is."""

    def deeper(levels):
        return verdicts() if levels == 0 else deeper(levels - 1)

    def verdicts():
        soar._readings.cache_clear()
        return [answers_equal(*pair[1:]) for pair in pairs]

    deep = [
        "(" * 95 + "5" + ")" * 95,
        "-" * 190 + "5",
        "√" * 190 + "1",
        "x " * 190,
        "1/" * 95 + "1",
    ]
    pairs = PAIRS[::3] + [(True, text, text + " + 0") for text in deep]
    first = verdicts()
    assert first[-len(deep) :] == [True] * len(deep)
    with mpmath.workdps(3):
        assert verdicts() == first
    assert deeper(300) == first
    pairs.reverse()
    assert verdicts() == first[::-1]


def test_arbitrary_text_never_raises():
    """An exception in a reward ends a night's run."""
    rng = random.Random(0)
    pieces = [chr(c) for c in range(32, 127)] + list("π∞−×⟦⟨¶∪²٣é½°±")
    pieces += r"\frac{ \sqrt{ ^{ } \pm \sin \log_ \left( \text{ \\ \le \overline{ \boxed{".split()
    pieces += [r"\begin{pmatrix}", r"\end{pmatrix}"]
    texts = ["".join(rng.choices(pieces, k=rng.randint(1, 25))) for _ in range(1500)]
    for left, right in zip(texts, texts[1:]):
        assert answers_equal(left, left + " ") or not left.strip()
        verdict = answers_equal(left, right)
        assert verdict in (True, False) and verdict == answers_equal(right, left)
        assert parses(left) in (True, False)
        assert student_reward(rf"\boxed{{{left}}}", right) in (0, 10, 20, 120)
    for code in [*range(0x3100), *range(0x3100, 0x110000, 97)]:
        if chr(code) not in "*\u00b7\u0387×∗⋅¹⑴﹡＊":  # products
            assert answers_equal(f"5{chr(code)}6", "30") is False


def real_golds(name: str) -> list[str]:
    return [row["answer"] for row in real_rows(name)]


def real_answers(count: int) -> list[str]:
    answers = real_golds("math_test") + real_golds("harp") + real_golds("olympiadbench")
    return random.Random(0).sample(sorted(set(answers)), count)


WORD = re.compile(r"(?<![a-zA-Z])(?!sin|cos|log)[a-zA-Z]{3,}|\b(by|to|no|is|th|Ps)\b")


@pytest.mark.parametrize("name", ["math_test", "harp", "olympiadbench"])
def test_real_golds_are_read(name):
    """An unread gold is matched by its own spelling only; 0.5 % of those without words may be."""
    golds = real_golds(name)
    unread = [gold for gold in golds if not parses(gold)]
    bare = [gold for gold in unread if not WORD.search(re.sub(r"\\[a-zA-Z]+", " ", gold))]
    assert len(bare) <= 0.005 * len(golds), bare


def rewrites(answer: str):
    """Other ways in which models write an answer."""
    words = re.search("text|mbox|[a-z]{4} ", answer)
    yield from (f"${answer}$", rf"\({answer}\)", f" {answer}.", rf"\displaystyle {answer}")
    yield answer.replace(r"\dfrac", r"\frac")
    yield answer.replace(r"\frac", r"\dfrac")
    yield answer.replace(r"\frac", r"\tfrac")
    yield re.sub(r"\\frac\{(\d)\}\{(\d)\}", r"\\frac\1\2", answer)
    yield re.sub(r"(?<!\d)(?<!\d )\\d?frac\{(\w+)\}\{(\w+)\}", r"{(\1)/(\2)}", answer)
    yield re.sub(r"\\sqrt\{(\d)\}", r"\\sqrt\1", answer.replace(r"\sqrt", r"\sqrt "))
    yield re.sub(r"\\sqrt\{(\d+)\}", r"√{\1}", answer)
    yield answer.replace(r"\pi", "π ").replace(r"\infty", "∞")
    yield answer.replace(r"\cup", "∪").replace(r"\cdot", r"\times ")
    yield re.sub(r"\^\{(\d)\}", r"^\1", re.sub(r"\^(\w)", r"^{\1}", answer))
    if not words:
        yield re.sub(r"\\sqrt\{(\w+)\}", r" sqrt(\1)", answer)
        yield re.sub(r"\s*([+=<>]|(?<=[\w}) ])-)\s*", r" \1 ", answer)
        yield answer.replace("-", "−")
    if not re.search(r"\\left|\\[bB]ig|\\sqrt\[|\\\\", answer):
        yield re.sub(
            r"(?<!\\)([(\[])", r"\\left\1", re.sub(r"(?<!\\)([)\]])", r"\\right\1", answer)
        )
    if answer.endswith(r"^\circ"):
        for unit in (r"^{\circ}", "°", " degrees", r"\text{ degrees}", ""):
            yield answer[:-6] + unit
    if re.fullmatch(r"\d+\\%", answer):
        for unit in ("%", " percent", r"\text{ percent}", r" \%", ""):
            yield answer[:-2] + unit
    if re.fullmatch(r"-?\d+", answer):
        yield from (answer + ".0", f"x={answer}", answer + r"\text{ units}", answer + " cm")
        yield rf"\frac{{{2 * int(answer)}}}{{2}}"
        for comma in (",", r",\!", "{,}", r"\,", " "):
            yield f"{int(answer):,}".replace(",", comma)
    if found := re.fullmatch(r"(-?)\\d?frac\{(\d+)\}\{([1-9]\d*)\}", answer):
        sign, p, q = found[1], int(found[2]), int(found[3])
        yield from (f"{sign}{p}/{q}", rf"\frac{{{sign}{p}}}{{{q}}}")
        yield rf"{sign}\frac{{{3 * p}}}{{{3 * q}}}"
        if p > q and p % q:
            yield from (rf"{sign}{p // q}\frac{{{p % q}}}{{{q}}}", f"{sign}{p // q} {p % q}/{q}")
        if 10**6 % q == 0:
            yield sign + f"{p / q:.6f}".rstrip("0").rstrip(".")
    if (
        not words
        and not re.search(r"[()\[\]{}\\]|\d,\d{3}|[a-z], *[a-z]", answer)
        and "," in answer
    ):
        items = answer.split(",")
        yield from (", ".join(items[::-1]), " and ".join(items), ";".join(items))
        yield r"\{" + answer + r"\}"
    if not re.search(
        r"[^-+\d^*/{}()a-z\\ ]|\\(?!frac|sqrt|pi)|\d\s*\\frac|\d \d|[a-z]{4} ", answer
    ):
        yield from (f"({answer})", rf"1\cdot({answer})", f"2({answer})-({answer})")


def near_misses(answer: str):
    """Wrong answers that look like it."""
    words = r"\\(text|mbox|hspace)\{[^{}]*\}(\^\{?\d\}?)?"
    plain = re.sub(words, lambda found: "#" * len(found[0]), answer)
    for digit in list(re.finditer(r"\d", plain))[:3]:
        yield answer[: digit.start()] + str((int(digit[0]) + 1) % 10) + answer[digit.end() :]
    if re.fullmatch(r"[\d./]*[1-9]|\\d?frac\{\d+\}\{\d+\}|\d*\\sqrt\{\d+\}|\d*\\pi", answer):
        yield from ("-" + answer, answer + "+1", answer + "i", f"2({answer})")
    if found := re.fullmatch(r"\(([^()\[\]]*,[^()\[\]]*)\)", answer):
        items = [item.strip() for item in found[1].split(",")]
        if items[0] != items[1]:
            yield "(" + ",".join([items[1], items[0], *items[2:]]) + ")"
        yield from (f"[{found[1]}]", f"[{found[1]})", f"({found[1]},0)")
        yield "(" + ",".join(items[:-1]) + ")"
    if re.fullmatch(r"-?\d+(, ?-?\d{1,2})+", answer):
        yield from (answer + ",7777", answer[answer.index(",") + 1 :], f"({answer})")


def test_real_answers_equal_their_rewrites_and_not_their_near_misses():
    """Symmetric, and neither too strict nor too loose on what the data sets really contain."""
    wrong = []
    for answer in real_answers(1000):
        for kind, others in ((True, rewrites(answer)), (False, near_misses(answer))):
            for other in dict.fromkeys(others):
                verdicts = answers_equal(other, answer), answers_equal(answer, other)
                if verdicts != (kind, kind):
                    wrong.append((answer, other, verdicts))
    assert not wrong


def test_neighbours_are_symmetric_and_mostly_unequal():
    """A verdict that depends on which of the two is the gold one is wrong once."""
    answers = sorted(real_answers(1500))
    verdicts = [(answers_equal(a, b), answers_equal(b, a)) for a, b in zip(answers, answers[1:])]
    assert all(first == second for first, second in verdicts)
    assert sum(first for first, _ in verdicts) < 90  # sorted neighbours: some are respellings


def seconds_without_cache(pairs: list[tuple[str, str]]) -> list[float]:
    times = []
    for left, right in pairs:
        soar._readings.cache_clear()
        start = time.process_time()
        answers_equal(left, right)
        times.append(time.process_time() - start)
    return sorted(times)


def test_speed_without_the_cache():
    """A step grades hundreds. Typical: median 0.2 ms, 95 % under 1 ms; the bounds are loose."""
    rng = random.Random(0)
    texts = rng.sample([text for _, row in ROWS for text in row], 600)
    sheets = [soar.worksheet(rng.choices(range(100), k=5)) for _ in range(600)]
    for texts in (texts, sheets):
        times = seconds_without_cache(list(zip(texts, texts[1:])))
        assert times[len(times) // 2] < 0.002 and times[len(times) * 95 // 100] < 0.015


def test_speed_of_a_step_by_the_cache(monkeypatch):
    """The gold answer meets a whole group, whose predictions repeat: each text is read once."""
    calls = []
    respell = soar._respell
    monkeypatch.setattr(soar, "_respell", lambda text: calls.append(text) or respell(text))
    soar._readings.cache_clear()
    group = [rf"so it is \boxed{{a= {n % 4} ,b= {n % 3} }}" for n in range(240)]
    rewards = [student_reward(completion, "a= 1 ,b= 2") for completion in group]
    assert (
        rewards.count(RIGHT) == 20 and len(calls) == 12
    )  # 4 * 3 texts, and one is the gold answer


# ==================================================================================================
# Problems
# ==================================================================================================


def test_read_jsonl(tmp_path):
    """Both field names, empty lines, numbers as answers, line separators in a text (only a newline
    ends a line)."""
    file = tmp_path / "p.jsonl"
    file.write_text(
        '{"problem": " 1+1? ", "answer": "2"}\n\n{"question": "2+2\u2028?", "answer": 4}\n', "utf-8"
    )
    assert soar.read_jsonl(str(file)) == [Problem("1+1?", "2"), Problem("2+2\u2028?", "4")]


@pytest.mark.parametrize(
    "content",
    [
        b'\xef\xbb\xbf{"problem": "q", "answer": "1"}',
        b'{"problem": "q", "answer": "1"}\r\n\r\n',
        b'{"problem": "q", "answer": 1, "a": null, "b": NaN, "c": [{"a": 1}, {"a": 2}]}\n',
        b'{"problem": "q", "answer": "1", "note": "' + b"n" * 10**6 + b'"}\n',
    ],
    ids=["bom", "crlf", "other fields", "long"],
)
def test_read_jsonl_takes_what_is_clear(content, tmp_path):
    """A byte order mark, Windows line ends, fields that nobody asked for: no reason to refuse."""
    file = tmp_path / "p.jsonl"
    file.write_bytes(content)
    assert soar.read_jsonl(str(file)) == [Problem("q", "1")]


@pytest.mark.parametrize(
    "line",
    [
        b"{'problem': 'q'}",
        b"[1]",
        b"17",
        b'"text"',
        b'{"problem": "q"}',
        b'{"answer": "1"}',
        b'{"problem": "q", "answer": "  "}',
        b'{"problem": "", "answer": "1"}',
        b'{"problem": 5, "answer": "1"}',
        b'{"problem": "q", "answer": null}',
        b'{"problem": "\\ud800", "answer": "1"}',
        b'{"problem": "q", "answer": "\\udfff"}',
        b'{"problem": "q", "answer": NaN}',
        b'{"problem": "q", "answer": -Infinity}',
        b'{"problem": "q", "answer": 1e999}',
        b'{"problem": "q", "answer": true}',
        b'{"problem": "q", "answer": {"value": 1}}',
        b'{"problem": "q", "answer": ["1"]}',
        b'{"problem": ["q"], "answer": "1"}',
        b'{"problem": "q", "answer": "1", "answer": "2"}',
        b'{"problem": "q", "answer": "$$"}',
        b'{"problem": "q", "answer": "no idea\\n#### "}',
        b'{"problem": "q", "answer": ' + b"9" * 5000 + b"}",
        b"[" * 10**5,
        b'{"x": ' * 10**5,
        b'{"problem": "q\x00", "answer": "1"}',
        b"\x00" * 4096,
        b"problem,answer",
        b'{"problem": "q", "answer": "1"},',
        b'[{"problem": "q", "answer": "1"}, {"problem": "r", "answer": "2"}]',
        b'{"problem": "q", "ans',
    ],
)
def test_read_jsonl_names_the_bad_line(line, tmp_path):
    """A mistake in line 3 of 5000 must be named by its number: no problem, and no traceback."""
    file = tmp_path / "p.jsonl"
    file.write_bytes(
        b'{"problem": "q", "answer": "1"}\n\n' + line + b'\n{"problem": "q", "answer": "1"}\n'
    )
    with pytest.raises(UserError, match="line 3") as refusal:
        soar.read_jsonl(str(file))
    assert len(str(refusal.value)) < 400 + len(str(tmp_path)) and "\n" not in str(refusal.value)
    str(refusal.value).encode()


@pytest.mark.parametrize(
    "content",
    [
        None,
        b'{"problem": "caf\xe9", "answer": "1"}\n',
        b"\n",
        b"",
        '{"problem": "q", "answer": "1"}'.encode("utf-16"),
        gzip.compress(b'{"problem": "q", "answer": "1"}\n'),
    ],
    ids=["missing", "latin-1", "blank", "empty", "utf-16", "gzip"],
)
def test_read_jsonl_unreadable_file(content, tmp_path):
    """A file that is missing, not UTF-8 or without a problem: a sentence must name it."""
    file = tmp_path / "p.jsonl"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UserError, match="p.jsonl"):
        soar.read_jsonl(str(file))
    with pytest.raises(UserError, match=re.escape(tmp_path.name)):
        soar.read_jsonl(str(tmp_path))  # a folder


@pytest.mark.parametrize(
    "field, meant",
    [
        ("18", "18"),
        ("She has 9 * 2 = <<9*2=18>>18.\n#### 18", "18"),
        ("#### 2,125", "2,125"),
        ("#### -3", "-3"),
        (r"\boxed{7}", "7"),
        (r"so $x=\boxed{\frac{1}{2}}$.", r"\frac{1}{2}"),
        (r"\boxed{3}, no, \boxed{4}", "4"),
        ("$7$", "7"),
        ("$$7$$", "7"),
        ("$69$,$84$", "69,84"),
        (r"$\$5$", r"\$5"),
        (" Odd ", "Odd"),
        ("1,2", "1,2"),
    ],
)
def test_gold_answer(field, meant, tmp_path):
    """An answer in its wrapping is matched by no right solution: its problem looks hard."""
    assert soar.gold_answer(field) == meant
    file = tmp_path / "p.jsonl"
    file.write_text(json.dumps({"question": "q", "answer": field}), "utf-8")
    assert soar.read_jsonl(str(file)) == [Problem("q", meant)]


@pytest.mark.parametrize(
    "first, second",
    [
        ("What is $1+1$?", "what  is 1 + 1"),
        (r"\frac{1}{2}", r"\dfrac12"),
        (r"\tfrac{a}{b}", r"\frac ab"),
        (r"$x^{2}$.", "$x^2.$"),
        (r"\left(1, 2\right)", "(1,2)"),
        (r"1\!:\!00 PM", "1:00 PM"),
        (r"30\%", "30%"),
        (r"$a \le b$", r"$a\leq{b}$"),
        (r"$1,2,\ldots,9$", "1, 2, ..., 9"),
        (r"\[x=1\]", r"\(x = 1\)"),
        (r"3\text{ cm}", "3 cm"),
        (r"the $n^\text{th}$ of", r"the $n^{\text{th}}$ of"),
        (r"$\sin x$ and", r"$\sin{x}$and"),
        (r"$\pi$ is", r"\pi is "),
        (r"costs $\$5$", "costs $5"),
        ("Is it\n  so?", "Is it so ?"),
        (r"1{,}000", "1,000"),
        ("$C^{}_{}$", "C"),
    ],
)
def test_same_wording(first, second):
    """A repetition in another dress, which would be in both halves of the hard set."""
    assert soar.same_wording(first) == soar.same_wording(second)


@pytest.mark.parametrize(
    "first, second",
    [
        ("What is $5-3$?", "What is $5+3$?"),
        ("What is $-3$?", "What is $3$?"),
        ("1,2", "12"),
        ("1 2", "12"),
        ("1.5", "15"),
        ("1.5", "1,5"),
        ("What is 5!", "What is 5?"),
        ("x_1", "x1"),
        ("x_1", "x^1"),
        ("f'(2)", "f(2)"),
        ("f''(2)", "f'(2)"),
        ("x^{23}", "x^{2}3"),
        ("x^{23}", "x^23"),
        (r"\frac{1}{23}", r"\frac{12}{3}"),
        (r"\frac{1}{23}", r"\frac{1}{2}3"),
        (r"\sqrt{ab}", r"\sqrt{a}b"),
        ("(1,2)", "[1,2]"),
        (r"\{1\}", "1"),
        ("|x|", "x"),
        ("x<1", "x>1"),
        (r"a\leq b", "a<b"),
        (r"\Delta", r"\delta"),
        (r"\sin x", r"\cos x"),
        (r"\alpha", "alpha"),
        (r"a \in t", r"a\int"),
        ("1, 2, 3, ...", "1, 2, 3"),
        ("50%", "50"),
        (r"\overline{AB}", "AB"),
        (r"\mathbf{v}", "v"),
        ("[asy]draw((0,0)--(1,2));[/asy]", "[asy]draw((0,0)--(1,3));[/asy]"),
        (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{pmatrix}1&2&3&4\end{pmatrix}"),
        (r"90^\circ", "90"),
        ("2:1", "21"),
    ],
)
def test_what_carries_meaning_is_no_dress(first, second):
    """Two problems that differ in a sign or a digit are taken for one; the second is lost."""
    assert soar.same_wording(first) != soar.same_wording(second)


def test_load_problems_drops_repetitions(tmp_path, capsys):
    """The same problem in both halves of the hard set; a contradiction or an answer in words passed
    over in silence."""
    rows = [
        ("What is $\\frac12+x$?", "1"),
        ("What is 1-1?", "0"),
        ("what is \\dfrac{1}{2} + x", "1.0"),
        ("What is 1+1?", "2"),
        ("What is  1+1", "3"),
        ("Odd or even?", r"\text{odd}"),
        ("Who?", "Jenna will win, whoever goes first"),
    ]
    file = tmp_path / "p.jsonl"
    file.write_text(
        "".join(json.dumps({"problem": q, "answer": a}) + "\n" for q, a in rows), "utf-8"
    )
    problems = soar.load_problems(str(file))
    assert problems == [Problem(*rows[i]) for i in (0, 1, 3, 5, 6)]
    line = capsys.readouterr().out
    assert (
        line.count("\n") == 1
        and "5 problems" in line
        and "2 repetition" in line
        and "1 of them" in line
    )
    assert "2 answer" in line and "Jenna will win" in line
    assert len(soar.read_jsonl(str(file))) == 7, "promotion questions may repeat"
    file.write_text('{"problem": "q", "answer": "1"}', "utf-8")
    soar.load_problems(str(file))
    line = capsys.readouterr().out
    assert "1 problems" in line and "repetition" not in line and "words" not in line


def test_real_repetitions():
    """A key that is too strict (HARP repeats itself, and repeats MATH) or too loose (OlympiadBench
    has long twins)."""
    keys = {
        name: [soar.same_wording(row["problem"]) for row in real_rows(name)]
        for name in ("math_test", "harp", "olympiadbench")
    }
    repeated = {name: len(texts) - len(set(texts)) for name, texts in keys.items()}
    assert (
        repeated["math_test"] == 1
        and 24 <= repeated["harp"] <= 40
        and repeated["olympiadbench"] == 0
    )
    assert 122 <= len(set(keys["math_test"]) & set(keys["harp"])) <= 160


# -- The hub: what load_dataset leaves in its cache, and HARP's zip archive behind an HTTP server.

# name: (its file of real problems, rows at the hub, repository, config, split, a problem as a row)
HUB_ROWS = {
    "math": (
        "math_test",
        5000,
        "DigitalLearningGmbH___math-lighteval",
        "default",
        "test",
        lambda question, answer: {
            "problem": question,
            "level": "Level 5",
            "solution": rf"So $x = \boxed{{{answer}}}$.",
            "type": "Algebra",
        },
    ),
    "harp": (
        "harp",
        4780,
        "",
        "",
        "",
        lambda question, answer: {
            "year": 1950,
            "contest": "AHSME",
            "number": 1,
            "level": 2,
            "subject": "algebra",
            "problem": question,
            "answer": f"${answer}$",
            "solution_1": "...",
        },
    ),
    "olympiad": (
        "olympiadbench",
        674,
        "Hothan___olympiad_bench",
        "OE_TO_maths_en_COMP",
        "train",
        lambda question, answer: {
            "id": 1606,
            "question": question,
            "final_answer": [f"${answer}$"],
            "is_multiple_answer": False,
            "unit": None,
            "error": None,
        },
    ),
}
MADE_UP = [
    Problem("What is $1+1$?", "2"),
    Problem("Solve $x^2 = 4$.", "-2,2"),
    Problem("What is 1 + 1?", "2"),
]


def hub_cache(root: Path, repository: str, config: str, split: str, rows: list[dict]) -> None:
    """One split as datasets 4.0 to 5.2 keep it: what an offline load_dataset finds."""
    import pyarrow

    name = repository.split("___")[1]
    folder = root / repository / config / "0.0.0" / ("0" * 40)
    folder.mkdir(parents=True)
    table = pyarrow.Table.from_pylist(rows)
    with pyarrow.OSFile(str(folder / f"{name}-{split}.arrow"), "wb") as file:
        with pyarrow.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table)
    info = {
        "builder_name": "parquet",
        "dataset_name": name,
        "config_name": config,
        "version": {"version_str": "0.0.0"},
        "splits": {
            split: {"name": split, "num_bytes": 1, "num_examples": len(rows), "dataset_name": name}
        },
    }
    (folder / "dataset_info.json").write_text(json.dumps(info), "utf-8")


def harp_zip(rows: list[dict]) -> bytes:
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as files:
        files.writestr("HARP.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
        files.writestr("__MACOSX/._HARP.jsonl", b"\x00\x05\x16\x07")
    return archive.getvalue()


class Server(http.server.ThreadingHTTPServer):
    """On this machine, at `url`: answers each request with `status`, `body` and a claim about its
    length."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Server.Handler)
        self.status, self.body, self.length, self.requests = 200, b"", None, 0
        self.url = f"http://127.0.0.1:{self.server_address[1]}/HARP.jsonl.zip"

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.server.requests += 1
            self.send_response(self.server.status)
            self.send_header("Content-Length", str(self.server.length or len(self.server.body)))
            self.end_headers()
            self.wfile.write(self.server.body)

        def log_message(self, *_):
            pass


@pytest.fixture
def server(monkeypatch):
    """HARP's server; the network is allowed."""
    with Server() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(soar, "HARP_URL", server.url)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.delenv("HF_HUB_OFFLINE")
        server.body = harp_zip(
            [HUB_ROWS["harp"][-1](*vars(problem).values()) for problem in MADE_UP]
        )
        yield server
        server.shutdown()


@pytest.mark.parametrize("real", [False, True], ids=["made up", "real"])
@pytest.mark.parametrize("dataset", HUB_ROWS)
def test_sets_of_the_hub(dataset, real, server, tmp_path, monkeypatch, capsys):
    """Another split or column than the hub's, lost rows, answers in their wrapping."""
    name, count, repository, config, split, row = HUB_ROWS[dataset]
    expected = (
        [Problem(row["problem"].strip(), row["answer"]) for row in real_rows(name)]
        if real
        else MADE_UP
    )
    rows = [row(problem.question, problem.answer) for problem in expected]
    if dataset == "harp":
        server.body = harp_zip(rows)
    else:
        datasets = pytest.importorskip("datasets")
        hub_cache(tmp_path / "hub", repository, config, split, rows)
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "hub"))
    found = soar.hub_problems(dataset, str(tmp_path / "cache"))
    assert len(found) == (count if real else 3)
    assert [problem.question for problem in found] == [problem.question for problem in expected]
    for problem, other in zip(found, expected, strict=True):
        assert (
            answers_equal(problem.answer, other.answer) or "$" in other.answer
        )  # four of HARP's are whole sentences
    assert not any(re.search(r"(?<!\\)\$", problem.answer) for problem in found)
    pool = soar.load_problems(dataset, str(tmp_path / "cache"))
    assert len({soar.same_wording(problem.question) for problem in pool}) == len(pool) <= count
    assert pool == MADE_UP[:2] or real
    assert f"{len(pool):,} problems" in capsys.readouterr().out


def test_rows_without_an_answer_are_counted(server, tmp_path, capsys):
    """Problems that vanish without a word."""
    server.body = harp_zip(
        [
            {"problem": "q", "answer": "$1$"},
            {"problem": "r", "answer": None},
            {"problem": "s", "answer": "$$"},
        ]
    )
    assert soar.hub_problems("harp", str(tmp_path)) == [Problem("q", "1")]
    assert "2 rows have no answer" in capsys.readouterr().out


def test_harp_is_downloaded_once(server, tmp_path, monkeypatch):
    """A download at every start, or a refusal by HF_HUB_OFFLINE although the file is there."""
    pool = soar.load_problems("harp", str(tmp_path / "cache"))
    assert server.requests == 1 and [path.name for path in (tmp_path / "cache").iterdir()] == [
        "HARP.jsonl.zip"
    ]
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert soar.load_problems("harp", str(tmp_path / "cache")) == pool and server.requests == 1
    with pytest.raises(UserError, match="HF_HUB_OFFLINE"):
        soar.load_problems("harp", str(tmp_path / "empty"))
    assert server.requests == 1


def test_harp_is_stored_whole(server, tmp_path, monkeypatch):
    """A run that dies while it writes the file leaves a part of it for every later run."""

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        soar.load_problems("harp", str(tmp_path))
    monkeypatch.undo()
    assert not (tmp_path / "HARP.jsonl.zip").exists()


def test_damaged_downloads(server, tmp_path):
    """Half a file, a flipped bit, a login page: stored as HARP, or a traceback."""
    whole = server.body
    flipped = bytearray(whole)
    flipped[60] ^= 1
    two = io.BytesIO()
    with zipfile.ZipFile(two, "w") as files:
        files.writestr("a.jsonl", "{}")
        files.writestr("b.jsonl", "{}")
    for body in (whole[:-30], bytes(flipped), b"<html>Please log in</html>", two.getvalue(), b""):
        server.body = body
        with pytest.raises(UserError, match="damaged.*try again") as refusal:
            soar.load_problems("harp", str(tmp_path))
        assert "\n" not in str(refusal.value) and not list(tmp_path.iterdir())
    server.body, server.length = whole[:-30], len(whole)  # the connection breaks off
    with pytest.raises(UserError, match="IncompleteRead.*network"):
        soar.load_problems("harp", str(tmp_path))
    server.status, server.length = 404, None
    with pytest.raises(UserError, match="404: .*no longer") as refusal:
        soar.load_problems("harp", str(tmp_path))
    assert not list(tmp_path.iterdir()) and "network" not in str(refusal.value)
    (tmp_path / "HARP.jsonl.zip").write_bytes(whole[:-30])
    with pytest.raises(UserError, match="HARP.jsonl.zip is damaged.*delete it"):
        soar.load_problems("harp", str(tmp_path))


def wrapped(error: Exception, message: str) -> Exception:
    """As the hub's libraries do it: the error is the cause of another one that says less."""
    outer = RuntimeError(message)
    outer.__cause__ = error
    return outer


@pytest.mark.parametrize(
    "error, reason, advice",
    [
        (ModuleNotFoundError("No module named 'aiohttp'"), "aiohttp", "pip install"),
        (
            wrapped(
                OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
                "An error occurred\nwhile generating",
            ),
            "Errno 28",
            "free space",
        ),
        (OSError("Not enough disk space. Needed: 3 GB"), "Needed: 3 GB", "free space"),
        (
            PermissionError(errno.EACCES, "Permission denied", "/cache"),
            "Permission denied",
            "HF_HOME",
        ),
        (FileNotFoundError("Dataset 'a/b' is a gated dataset on the Hub."), "a/b", "hf auth login"),
        (
            urllib.error.HTTPError("http://x", 401, "Unauthorized", None, None),
            "401",
            "hf auth login",
        ),
        (
            FileNotFoundError("Dataset 'a/b' doesn't exist on the Hub or cannot be accessed."),
            "a/b",
            "no longer",
        ),
        (
            urllib.error.HTTPError("http://x", 503, "Service Unavailable", None, None),
            "503",
            "later",
        ),
        (ConnectionError("Couldn't reach 'a/b' on the Hub"), "Couldn't reach", "network"),
        (
            urllib.error.URLError(OSError(-2, "Name or service not known")),
            "Name or service",
            "network",
        ),
        (TimeoutError("timed out"), "timed out", "network"),
        (ValueError("a new kind of trouble"), "new kind of trouble", "local file"),
    ],
)
def test_loading_names_the_reason(error, reason, advice, tmp_path, monkeypatch):
    """ "Check the network", said to a person whose disk is full."""
    datasets = pytest.importorskip("datasets")

    def load_dataset(**_):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(UserError, match="cannot load math") as refusal:
        soar.load_problems("math", str(tmp_path))
    text = str(refusal.value)
    assert reason in text and advice in text and "local file" in text and "\n" not in text
    assert ("network" in text) == (advice == "network")


def test_changed_columns(tmp_path, monkeypatch):
    """A set with other columns than expected is no matter of the network."""
    datasets = pytest.importorskip("datasets")
    for rows in ([{"question": "q", "answer": "1"}], [{"problem": None, "solution": r"\boxed{1}"}]):
        monkeypatch.setattr(datasets, "load_dataset", lambda **_: rows)
        with pytest.raises(UserError, match="other rows than expected") as refusal:
            soar.load_problems("math", str(tmp_path))
        assert "network" not in str(refusal.value)


# ==================================================================================================
# Examples in docstrings
# ==================================================================================================


@pytest.mark.parametrize("module", [soar, eval_])
def test_docstring_examples(module):
    """An example that is no longer true."""
    result = doctest.testmod(module)
    assert result.failed == 0 and result.attempted >= 3


# ==================================================================================================
# The tiny world
# ==================================================================================================


def test_topic_of_what_the_world_writes():
    """The shares of the topics in the closing table would be wrong without an error."""
    world, rng = soar.make_world(0), random.Random(0)
    for topic, mark in (("products", "*"), ("sums", "+"), ("ambiguous", "x")):
        for length in range(1, 6):
            sheet = soar.worksheet([soar.random_item(rng, topic)[0] for _ in range(length)])
            assert soar.topic_of(sheet) == topic and mark in sheet
    assert {soar.topic_of(soar.textbook_exercise(world, rng)[0]) for _ in range(100)} == set(
        soar.TOPICS
    )
    mixed = [
        soar.worksheet(["4*5", "4+5"]),
        "a= 4*5 ,c",
        "b= 4*5",
        "",
        "What is 4*5?",
        "a= 4*5 <unk>",
    ]
    assert [soar.topic_of(text) for text in mixed] == ["other"] * len(mixed)


def test_hard_worksheets():
    """A product that the crowd has right would end the plateau, a wrong key make it last."""
    world = soar.make_world(0)
    sheets = soar.hard_worksheets(world, 200, 0)
    assert len({problem.question for problem in sheets}) == 200
    for problem in sheets:
        items, answers = problem.question.split(), problem.answer.split()
        assert items[::2] == answers[::2] == list(soar.LABELS)
        for item, answer in zip(items[1::2], answers[1::2]):
            x, y = map(int, item.split("*"))
            assert int(answer) == x * y != crowd_says(world, x, y)


def test_world_is_a_function_of_its_seed():
    """Two runs that are compared live in the same world; another seed is another world."""
    assert soar.make_world(3) == soar.make_world(3) != soar.make_world(4)
    assert all(
        wrong != x * y for seed in range(5) for (x, y), wrong in soar.make_world(seed).items()
    )
    worlds = [soar.hard_worksheets(soar.make_world(0), 20, seed) for seed in (0, 0, 1)]
    assert worlds[0] == worlds[1] != worlds[2]


def test_people_think_less_over_long_sheets():
    """Products that are right as often on long sheets as on short ones: chance, not SOAR, would end
    the plateau."""
    world, rng, right, asked = soar.make_world(0), random.Random(0), Counter(), Counter()
    for _ in range(20_000):
        question, answer = soar.forum_post(world, rng)
        items, answers = question.split()[1::2], answer.split()[1::2]
        for item, given in zip(items, answers):
            x, sign, y = item
            if sign == "+" or x == "x":
                continue
            truth = int(x) * int(y)
            if crowd_says(world, int(x), int(y)) != truth:
                asked[len(items)] += 1
                right[len(items)] += int(given) == truth
    for length in range(1, 6):
        assert right[length] / asked[length] == pytest.approx(0.2 / length, rel=0.2)


def test_base_model_is_named_by_what_made_it(tmp_path, monkeypatch):
    """A cached model of another world, or half a model, that is taken for this one's."""
    monkeypatch.setattr(soar, "pretrain", lambda *_: None)
    config = small_config(cache=str(tmp_path))
    folders = [soar.tiny_base_model(config)]
    assert soar.tiny_base_model(config) == folders[0]
    folders.append(soar.tiny_base_model(dataclasses.replace(config, data_seed=1)))
    monkeypatch.setattr(soar, "KEY_RIGHT", 0.5)
    folders.append(soar.tiny_base_model(config))
    monkeypatch.setattr(soar, "section_source", lambda heading: "other code")
    folders.append(soar.tiny_base_model(config))
    assert {*map(Path, folders)} == {*tmp_path.iterdir()} and len({*folders}) == 4
    Path(folders[-1], "tokenizer.json").unlink()
    with pytest.raises(UserError, match="damaged; delete it"):
        soar.tiny_base_model(config)


def test_plateau_by_probability(policy):
    """The base model's own probabilities: a success among a run's 500,000 attempts at hard sheets
    must be unlikely, while short sheets are within reach."""

    def probability(sheets):
        rollouts = [
            Rollout(
                policy.student_prompt(p),
                policy.tokenizer(f"\\boxed{{ {p.answer} }} <eos>").input_ids,
                "",
                False,
            )
            for p in sheets
        ]
        with torch.no_grad():
            return (
                soar.completion_logprobs(policy.model, rollouts, 0.7).double().exp().mean().item()
            )

    world = soar.make_world(0)
    assert probability(soar.hard_worksheets(world, 64, 0)) * 500_000 < 0.05
    assert 0.03 < probability(single_products(world)) < 0.5


# ======================================================================================================================
# Policy
# ======================================================================================================================


def test_restore_is_in_place_and_snapshots_are_copies():
    """A snapshot that shares memory with the model changes with it; a restore that rebinds loses
    the optimizer."""
    model = random_model()
    weights, addresses = soar.snapshot(model), [p.data_ptr() for p in model.parameters()]
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1)
    assert not any(torch.equal(p, w) for p, w in zip(model.parameters(), weights))
    soar.restore(model, weights)
    assert same(model.parameters(), weights) and addresses == [
        p.data_ptr() for p in model.parameters()
    ]


def test_braces_in_a_problem(policy):
    """str.format on a prompt stumbles over LaTeX."""
    seen = []
    policy.encode = seen.append
    policy.student_prompt(Problem(r"\frac{1}{2} {problem} {x}", "1"))
    assert seen == [r"User: \frac{1}{2} {problem} {x} Assistant:"]


# ======================================================================================================================
# Sampler
# ======================================================================================================================

PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [12, 13], [14, 15, 16, 17]]


def model_that_ends(kind: str):
    """A random model, and two EOS ids by which its greedy completions of PROMPTS end at different
    times."""
    model = random_model(kind, eos=[1])
    model.generation_config.eos_token_id = [999]
    tokens = soar.generate(model, PROMPTS, 1, 16)[0]
    for pair in itertools.combinations(sorted(set(tokens.flatten().tolist())), 2):
        ends = [
            next((t for t, token in enumerate(row) if token in pair), 99) for row in tokens.tolist()
        ]
        if len(set(ends)) == 3 and 1 < min(ends):
            model.generation_config.eos_token_id = list(pair)
            return model
    raise AssertionError("no such pair: take another seed for the random model")


# GPT-2's positions are absolute: a shift shows.
@pytest.mark.parametrize("kind", ["Llama", "Qwen2", "GPT2"])
def test_greedy_equals_transformers(kind):
    """Wrong positions under left padding, a cache out of step after rows have left, a second EOS id
    that is ignored."""
    model = model_that_ends(kind)
    tokens, lengths, _ = soar.generate(model, PROMPTS, 1, 16)
    T = max(map(len, PROMPTS))
    ids = torch.tensor([[0] * (T - len(p)) + p for p in PROMPTS])
    mask = torch.tensor([[0] * (T - len(p)) + [1] * len(p) for p in PROMPTS])
    expected = model.generate(
        input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=16, pad_token_id=0
    )
    expected = expected[:, T:]
    assert (
        torch.equal(tokens[:, : expected.shape[1]], expected)
        and not tokens[:, expected.shape[1] :].any()
    )
    eos = soar.eos_ids(model)
    assert len(eos) == 2 and len(set(lengths.tolist())) == 3
    for row, length in zip(tokens.tolist(), lengths.tolist()):
        assert length == 16 or row[length - 1] in eos
        assert not eos & set(row[: length - 1])


@pytest.mark.parametrize("kind", ["Llama", "Qwen2", "GPT2"])
def test_greedy_does_not_depend_on_neighbours(kind):
    """Attention that sees padding: a prompt's reward would depend on what it is batched with."""
    model = model_that_ends(kind)
    together = soar.generate(model, PROMPTS, 1, 16)
    for i, prompt in enumerate(PROMPTS):
        alone = soar.generate(model, [prompt], 1, 16)
        assert torch.equal(alone[0][0], together[0][i]) and alone[1][0] == together[1][i]


def uniforms(rows: int, tokens: int, seed: int = 1):
    return torch.rand(rows, tokens, generator=torch.Generator().manual_seed(seed))


def slow_sample(model, prompts, n, limit, temperature, uniforms):
    """What generate() must equal: each row alone, a full forward for each token, no cache, no
    padding."""
    eos, rows = soar.eos_ids(model), []
    for row in range(len(prompts) * n):
        ids = list(prompts[row // n])
        for t in range(limit):
            with torch.no_grad():
                p = (model(input_ids=torch.tensor([ids])).logits[0, -1] / temperature).softmax(-1)
            # The first token whose cumulative probability exceeds u.
            ids.append(int((p.cumsum(0) <= uniforms[row, t]).sum()))
            if ids[-1] in eos:
                break
        rows.append(ids[len(prompts[row // n]) :])
    return rows


@pytest.mark.parametrize("kind", ["Llama", "Qwen2"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampling_equals_the_slow_way(kind, temperature):
    """Rows that leave the batch must take nothing of the others along, and a prompt's completions
    stay together."""
    model = random_model(kind, eos=range(0, 32, 5))
    tokens, lengths, _ = soar.generate(model, PROMPTS, 5, 12, temperature, uniforms(15, 12))
    expected = slow_sample(model, PROMPTS, 5, 12, temperature, uniforms(15, 12))
    assert [row[:length] for row, length in zip(tokens.tolist(), lengths.tolist())] == expected
    assert len(set(map(len, expected))) > 3  # rows did leave at different times
    assert all(not row[length:].any() for row, length in zip(tokens, lengths))


WINDOW = {"sliding_window": 4, "head_dim": 8}  # shorter than the longest prompt
GEMMA3 = {"layer_types": ["sliding_attention", "full_attention"], "tie_word_embeddings": False}


@pytest.mark.parametrize(
    "kind, settings",
    [
        ("Llama", {}),
        ("Llama", {"num_key_value_heads": 1}),
        ("Qwen2", {}),
        ("Qwen3", {"head_dim": 8}),
        ("Phi3", {}),
        ("Mistral", WINDOW),
        ("Gemma2", WINDOW),
        ("Gemma3Text", WINDOW | GEMMA3),
        ("GPT2", {}),
        ("GPTNeoX", {}),
        ("Bloom", {"n_head": 4}),
        ("OPT", {"ffn_dim": 64, "word_embed_proj_dim": 32}),
    ],
)
def test_sampling_by_all_kinds_of_attention(kind, settings):
    """Query heads paired with another group's keys, a sliding window or ALiBi lost, padding seen:
    the tokens must be those of transformers' plainest attention, without cache and padding."""
    model = random_model(kind, eos=range(0, 32, 5), **settings)
    tokens, lengths, logprobs = soar.generate(model, PROMPTS, 5, 12, 0.7, uniforms(15, 12))
    if kind != "Bloom":  # which has one implementation only
        model.set_attn_implementation("eager")
    expected = slow_sample(model, PROMPTS, 5, 12, 0.7, uniforms(15, 12))
    assert [row[:length] for row, length in zip(tokens.tolist(), lengths.tolist())] == expected
    assert len(set(map(len, expected))) > 2
    for row, completion in enumerate(expected):
        rollout = Rollout(PROMPTS[row // 5], completion, "", False)
        logprob = slow_logprob(model, rollout, 0.7).item()
        assert logprobs[row].sum().item() == pytest.approx(logprob, abs=1e-3)


def test_attention_copies_no_cache_and_leaves_no_query_blind(monkeypatch):
    """Keys and values repeated for every query head at every token: most of the memory traffic of
    decoding. And a padded query that sees nothing: NaN on some GPUs."""
    model, seen = random_model("Qwen2", eos=range(0, 32, 5)), []
    real = torch.nn.functional.scaled_dot_product_attention

    def spy(query, key, value, attn_mask=None, **more):
        seen.append((query.shape, key.shape, attn_mask))
        return real(query, key, value, attn_mask=attn_mask, **more)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    soar.generate(model, PROMPTS, 5, 12, 1.0, uniforms(15, 12))
    prefill, decoding = seen[:2], seen[2:]  # of two layers
    assert all(query[0] == 3 for query, _, _ in prefill)
    assert len(decoding) > 10 and all(key[1] == 2 for _, key, _ in decoding)
    assert all(mask.any(-1).all() for _, _, mask in seen if mask is not None)


def test_a_query_that_sees_nothing_sees_itself():
    """Attention weights of a row without any key are 0 / 0."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 3, 4)  # [1, heads, T, D]
    sees = torch.tensor([[0, 0, 0], [0, 1, 0], [0, 1, 1]]).bool()  # [T, T]
    out, _ = soar.attention(torch.nn.Module(), q, k, v, sees[None, None])
    sees[0, 0] = True
    weights = (q @ k.mT / 2).masked_fill(~sees, -math.inf).softmax(-1)
    torch.testing.assert_close(out, (weights @ v).transpose(1, 2))


def test_sampling_frequencies():
    """Top-k, top-p or a temperature applied twice: samples from another policy than the one that is
    trained."""
    model, n = random_model(), 20_000
    tokens = soar.generate(model, [PROMPTS[0]], n, 1, 0.7, uniforms(n, 1))[0]
    expected = (
        n * (model(input_ids=torch.tensor(PROMPTS[:1])).logits[0, -1] / 0.7).softmax(-1).detach()
    )
    counts, common = torch.bincount(tokens[:, 0], minlength=32), expected > 5
    chi2 = ((counts - expected) ** 2 / expected)[common].sum().item()
    assert common.sum() > 10 and chi2 < 2 * common.sum() + 20  # its mean is the number of cells


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_generate_reports_the_log_probabilities_of_its_tokens(temperature):
    """Log-probabilities of a row that has left given to another one, taken at temperature 1, or
    counted on after EOS."""
    model = random_model(eos=range(0, 32, 5))
    tokens, lengths, logprobs = soar.generate(model, PROMPTS, 5, 12, temperature, uniforms(15, 12))
    assert len(set(lengths.tolist())) > 3
    for row, length in enumerate(lengths.tolist()):
        rollout = Rollout(PROMPTS[row // 5], tokens[row, :length].tolist(), "", False)
        assert logprobs[row].sum().item() == pytest.approx(
            slow_logprob(model, rollout, temperature).item(), abs=1e-4
        )
        assert (logprobs[row, :length] < 0).all() and not logprobs[row, length:].any()
    assert not soar.generate(model, PROMPTS, 5, 12, temperature)[2].any()  # greedy: for certain


def test_rollouts_carry_the_log_probability_of_their_sampling(policy):
    """The temperature forgotten between sampler and rollout, or rows of one part given the figures of another."""
    config = small_config(sample_tokens=200)
    prompts = [
        policy.student_prompt(problem) for problem in single_products(soar.make_world(0))[:3]
    ]
    rollouts = soar.sample(policy, prompts, 4, 12, config, soar.seeded("logprobs"))
    expected = soar.completion_logprobs(policy.model, rollouts, config.temperature)
    assert torch.tensor([r.logprob for r in rollouts]).tolist() == pytest.approx(
        expected.tolist(), abs=1e-4
    )
    assert expected.std() > 0.1


def test_pick_tokens_by_hand():
    """The temperature forgotten, or applied to the tokens and not to their log-probabilities; both
    in bfloat16; tokens of a row by the distribution of another."""
    probs = torch.tensor([[0.2, 0.5, 0.3], [0.5, 0.25, 0.25]])
    u = torch.arange(0.005, 1, 0.01)
    for temperature, power in ((1.0, 1), (0.5, 2)):
        sharp = probs**power / (probs**power).sum(1, keepdim=True)
        for row in range(2):
            logits = torch.stack([probs[1 - row], probs[row]] * 50).log()
            tokens, logprobs = soar.pick_tokens(logits, temperature, u)
            for i in range(1, 100, 2):
                below = sharp[row, : tokens[i]].sum()
                assert below <= u[i] < below + sharp[row, tokens[i]]
            expected = sharp[row, tokens[1::2]].log()
            torch.testing.assert_close(logprobs[1::2], expected, rtol=1e-4, atol=1e-5)
    tokens, logprobs = soar.pick_tokens(probs.log().bfloat16(), 1.0)
    assert tokens.tolist() == [1, 0] and logprobs.dtype == torch.float32 and not logprobs.any()
    logits = torch.randn(4, 999).bfloat16()
    tokens, logprobs = soar.pick_tokens(logits, 1.0, u[:4])
    expected = logits.double().log_softmax(-1).gather(-1, tokens[:, None])[:, 0]
    torch.testing.assert_close(logprobs.double(), expected, rtol=1e-5, atol=1e-4)


def test_pick_tokens_at_the_ends():
    """u close to 1 with a rounded cumulative sum: an index after the vocabulary; u = 0: a token of
    probability 0."""
    logits = torch.full((2, 5), -math.inf)
    logits[:, 1:4] = 0.0
    assert soar.pick_tokens(logits, 1.0, torch.tensor([0.0, 1 - 2**-24]))[0].tolist() == [1, 3]


def test_cache_is_allocated_once(monkeypatch):
    """A cache that is copied as it grows, or whenever a row leaves: most of the time of a long
    completion."""
    caches, real = [], soar.row_cache
    monkeypatch.setattr(soar, "row_cache", lambda *args: caches.append(real(*args)) or caches[-1])
    model, seen = random_model(eos=range(0, 32, 5)), set()
    model.register_forward_hook(
        lambda *_: seen.add((caches[0].layers[0].keys.data_ptr(), caches[0].layers[0].rows))
    )
    soar.generate(model, PROMPTS, 5, 12, 1.0, uniforms(15, 12))
    assert len({address for address, _ in seen}) == 1 and len({rows for _, rows in seen}) > 3
    assert caches[0].layers[0].keys.shape[2] == max(map(len, PROMPTS)) + 12


def test_generate_refuses_train_mode():
    """In train mode with checkpointing the cache is dropped in silence, and the tokens are wrong."""
    with pytest.raises(AssertionError, match="train mode"):
        soar.generate(random_model().train(), PROMPTS, 1, 2)


@pytest.mark.parametrize("budget", [1, 40, 200, 300, 10**6])
def test_sample_in_parts(budget, policy):
    """--sample-tokens for less than a row, some rows of a prompt, one prompt, all prompts: a
    completion lost, doubled or swapped."""
    problems = single_products(soar.make_world(0))[:3]
    prompts = [policy.student_prompt(problem) for problem in problems]
    greedy = [r.text for r in soar.sample(policy, prompts, 1, 12, small_config())]
    assert len(set(greedy)) == 3
    rollouts = soar.sample(policy, prompts, 5, 12, small_config(sample_tokens=budget))
    assert [r.prompt for r in rollouts] == [prompt for prompt in prompts for _ in range(5)]
    assert [r.text for r in rollouts] == [text for text in greedy for _ in range(5)]


@pytest.mark.parametrize("n", [1, 3, 8])
def test_sample_parts_hold_all_within_the_budget(n):
    """One long prompt, which decides how long the cache of every row is, must narrow its own part
    and no other."""
    rng = random.Random(0)
    prompts = [[1] * rng.choice((2, 3, 4, 40)) for _ in range(30)]
    for budget in (1, 60, 200, 10**6):
        parts = list(soar.sample_parts(prompts, n, 8, budget))
        drawn = [prompt for part, copies in parts for prompt in part for _ in range(copies)]
        expected = [prompt for prompt in prompts for _ in range(n)]
        assert len(drawn) == len(expected) and all(a is b for a, b in zip(drawn, expected))
        for part, copies in parts:
            rows, longest = len(part) * copies, max(map(len, part))
            assert rows == 1 or rows * (longest + 8) <= budget
    assert len(parts) == 1


def test_sample_tokens_change_no_sample(policy):
    """Parts that start from the same random numbers would repeat each other; and memory must not
    decide what is sampled."""
    prompts = [policy.teacher_prompt(), policy.student_prompt(Problem("a= 4*5", ""))]
    texts = []
    for budget in (10**6, 600, 250):
        config = small_config(sample_tokens=budget)
        rollouts = soar.sample(policy, prompts, 12, 40, config, soar.seeded("parts"))
        texts.append([rollout.text for rollout in rollouts])
    assert texts[0] == texts[1] == texts[2] and len(set(texts[0][:12])) > 6


def test_rollouts_end_with_eos_or_are_truncated(policy):
    """EOS must stay in the trained ids and out of the text."""
    prompts = [
        policy.student_prompt(problem) for problem in single_products(soar.make_world(0))[:4]
    ]
    (eos,) = soar.eos_ids(policy.model)
    for rollout in soar.sample(policy, prompts, 4, 24, small_config(), soar.seeded(0)):
        assert (
            rollout.completion[-1] == eos and not rollout.truncated and "<eos>" not in rollout.text
        )
        assert rollout.text.split() == policy.tokenizer.convert_ids_to_tokens(
            rollout.completion[:-1]
        )
    for rollout in soar.sample(policy, prompts, 4, 2, small_config(), soar.seeded(0)):
        assert len(rollout.completion) == 2 and rollout.truncated


# ==================================================================================================
# The hard set
# ==================================================================================================


@pytest.mark.parametrize("n, c", [(1, 0), (1, 1), (4, 0), (4, 1), (5, 2), (6, 4), (6, 6)])
def test_pass_at_k_against_all_subsets(n, c):
    """The estimator 1 - (1 - c/n)^k, which is biased, or a wrong product where k > n - c."""
    for k in range(1, n + 1):
        subsets = list(itertools.combinations([1] * c + [0] * (n - c), k))
        assert soar.pass_at_k(n, c, k) == pytest.approx(
            sum(map(any, subsets)) / len(subsets), abs=1e-12
        )


@pytest.mark.parametrize("k", [1, 8, 20, 128])
@pytest.mark.parametrize("repeats", [1, 7])
def test_filter_keeps_what_fails_k_times(k, repeats, policy, tmp_path, monkeypatch):
    """A problem lost between two limits or two parts, or one kept that was solved once."""
    first = dict(
        enumerate([0, 7, 8, 19, 20, 31, 32, 127, 128, 999] * repeats)
    )  # problem -> its first sample that is right
    pool, drawn = [Problem(str(i), "1") for i in first], dict.fromkeys(first, 0)

    def solve(policy, problems, n, *_):
        rewards = []
        for i in (int(problem.question) for problem in problems):
            rewards += [RIGHT if drawn[i] + j == first[i] else 10.0 for j in range(n)]
            drawn[i] += n
        return [], torch.tensor(rewards, dtype=torch.float64)

    monkeypatch.setattr(soar, "solve", solve)
    hard = soar.hard_problems(policy, pool, small_config(fail_k=k, cache=str(tmp_path)))
    assert [int(problem.question) for problem in hard] == [i for i in first if first[i] >= k]
    assert all(drawn[i] == k for i in first if first[i] >= k)
    assert drawn[0] == min(k, 8)  # easy problems are cheap


def test_filter_of_a_part_that_is_soon_solved(policy, tmp_path):
    """Nobody is left for the next limit: this was a traceback, in a part of 32 easy problems."""
    config = small_config(fail_k=9, cache=str(tmp_path))
    assert soar.hard_problems(policy, single_sums()[:2], config) == []


def test_filter_goes_on_after_a_stop(policy, tmp_path, monkeypatch):
    """A filter of hours that is interrupted must go on where it was, and come to the same set."""
    pool = [p for pair in zip(single_sums(), single_products(soar.make_world(0))) for p in pair][
        :56
    ]
    pool += soar.hard_worksheets(
        soar.make_world(0), 14, 0
    )  # 70 problems: three parts of at most 32
    config = small_config(fail_k=12, cache=str(tmp_path / "whole"))
    calls, solve = [], soar.solve

    def counted(*args):
        calls.append(1)
        if len(calls) == stop:
            raise KeyboardInterrupt
        return solve(*args)

    monkeypatch.setattr(soar, "solve", counted)
    stop = None
    whole = soar.hard_problems(policy, pool, config)
    needed = len(calls)
    assert 14 <= len(whole) < 70 and needed == 6  # two limits in each part
    assert (
        soar.hard_problems(policy, pool, config) == whole and len(calls) == needed
    )  # a finished one is read
    config.cache = str(tmp_path / "parts")
    for stop in (4, 3):  # in the middle of the second part, and at the start of the third
        calls.clear()
        with pytest.raises(KeyboardInterrupt):
            soar.hard_problems(policy, pool, config)
        assert len(list((tmp_path / "parts").iterdir())) == 1
    calls.clear()
    stop = None
    assert soar.hard_problems(policy, pool, config) == whole and len(calls) == 2


def test_filter_cache_is_keyed_by_what_matters(policy, tmp_path, monkeypatch):
    """The hard set of other weights, another k or another prompt that is taken for this one's."""
    pool, config = (
        single_products(soar.make_world(0))[:2],
        small_config(fail_k=1, cache=str(tmp_path)),
    )
    cache = lambda: len(list(tmp_path.iterdir()))
    soar.hard_problems(policy, pool, config)
    assert cache() == 1
    for change in ({"fail_k": 2}, {"temperature": 0.9}, {"student_tokens": 20}, {"data_seed": 1}):
        before = cache()
        soar.hard_problems(policy, pool, dataclasses.replace(config, **change))
        assert cache() == before + 1
    soar.hard_problems(policy, pool[:1], config)
    policy.student_text = "Teacher: {problem} Assistant:"
    soar.hard_problems(policy, pool, config)
    with torch.no_grad():
        policy.base[-1][-1] += 1e-3  # one single weight
    soar.hard_problems(policy, pool, config)
    assert cache() == 8
    count, eos = cache(), policy.model.generation_config.eos_token_id
    policy.model.generation_config.eos_token_id = [*eos, 2]  # other ends, so other answers
    soar.hard_problems(policy, pool, config)
    policy.model.generation_config.eos_token_id = eos
    policy.tokenizer.add_tokens("new")  # another vocabulary reads other words
    soar.hard_problems(policy, pool, config)
    monkeypatch.setattr(soar, "section_source", lambda title: "another verifier")
    soar.hard_problems(policy, pool, config)
    assert cache() == count + 3


def test_section_source():
    """A filter's file must have another name when the verifier changes, and no other section."""
    text = soar.section_source("13. Verifier")
    assert "def answers_equal" in text and "def parses" in text and "def hard_problems" not in text
    with pytest.raises(IndexError):  # the section has another heading now
        soar.section_source("13. Verifiers")


def test_filter_cache_damaged(policy, tmp_path):
    """A damaged file must be named, not started over and not trusted."""
    pool, config = (
        single_products(soar.make_world(0))[:2],
        small_config(fail_k=1, cache=str(tmp_path)),
    )
    soar.hard_problems(policy, pool, config)
    (file,) = tmp_path.iterdir()
    file.write_text(file.read_text()[:-5])
    with pytest.raises(UserError, match=file.name):
        soar.hard_problems(policy, pool, config)


def test_split():
    """Train and test that overlap: the report would be about problems that paid the teacher."""
    problems = [Problem(str(i), "1") for i in range(21)]
    train, test = soar.split_hard(problems, Config())
    assert len(train) == 10 and len(test) == 11 and {*train, *test} == {*problems}
    assert soar.split_hard(problems, Config(seed=5)) == (
        train,
        test,
    )  # shared by runs with different seeds
    assert soar.split_hard(problems, Config(data_seed=1)) != (train, test)
    for few in ([], problems[:1]):
        with pytest.raises(UserError, match="--pool"):
            soar.split_hard(few, Config())


# ======================================================================================================================
# Optimizer
# ======================================================================================================================


@pytest.mark.parametrize("weight_decay, clip", [(0.0, 0.0), (0.1, 0.0), (0.1, 0.5)])
def test_adamw_equals_torch(weight_decay, clip):
    """Bias correction, decoupled decay, eps outside of the root, clipping by the norm of all
    gradients together."""
    torch.manual_seed(0)
    ours, theirs = (
        torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Linear(5, 4)) for _ in range(2)
    )
    theirs.load_state_dict(ours.state_dict())
    config = Config(weight_decay=weight_decay, clip=clip)
    optimizer = torch.optim.AdamW(theirs.parameters(), betas=(0.8, 0.95), weight_decay=weight_decay)
    state = soar.adamw_state(ours)
    for step in range(10):
        x, lr = torch.randn(7, 6), 0.01 / (step + 1)
        for model in (ours, theirs):
            model(x).square().sum().backward()
        if clip:
            norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), clip)
            assert norm > clip
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()
        soar.adamw_step(ours, state, lr, config, betas=(0.8, 0.95))
        # Or the next batch would be added to this one.
        assert all(p.grad is None for p in ours.parameters())
        for a, b in zip(ours.parameters(), theirs.parameters()):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adamw_in_pieces_is_adamw(dtype, monkeypatch):
    """Temporaries as long as the embedding; a piece left out, done twice, rounded otherwise."""

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **kwargs or {})
            in_place = "_." in str(function)
            if isinstance(result, torch.Tensor) and not function.is_view and not in_place:
                made.append(result.numel())
            return result

    def step(piece):
        monkeypatch.setattr(soar, "PIECE", piece)
        torch.manual_seed(0)
        module = torch.nn.ParameterList([torch.randn(40, 50).to(dtype), torch.randn(7).to(dtype)])
        state, generator = soar.adamw_state(module), torch.Generator().manual_seed(0)
        for _ in range(3):
            for p in module:
                p.grad = torch.randn(p.shape).to(dtype)
            made.clear()
            with Sizes():
                soar.adamw_step(module, state, 1e-2, Config(weight_decay=0.1), generator)
        return [*module, *state["m"], *state["v"]]

    made = []
    whole = step(10**6)
    assert max(made) == 2000
    for piece in (1999, 64):
        assert same(step(piece), whole)
        assert max(made) == piece


@pytest.mark.parametrize("value", [0.02, -0.02, 1.0, -3.25, 1.003, -1e-3, 1e-30, 0.0])
def test_stochastic_rounding_is_unbiased(value):
    """Truncation, a carry that is lost, or negative numbers rounded the other way."""
    x = torch.full((200_000,), value)
    rounded = soar.stochastic_round(x, torch.Generator().manual_seed(0))
    assert rounded.dtype == torch.bfloat16
    seen = sorted(set(rounded.tolist()))
    if float(torch.tensor(value).to(torch.bfloat16)) == x[0].item():
        assert seen == [x[0].item()]  # exactly representable: unchanged
    else:
        low, high = seen  # the two neighbours and no others
        assert low < x[0].item() < high and high - low <= abs(value) / 128 * 1.01
        error = rounded.double().mean().item() - x[0].item()
        assert abs(error) < 4 * (high - low) / 2 / len(x) ** 0.5


def test_small_steps_reach_bfloat16_weights(monkeypatch):
    """Plain rounding loses each step of 1e-5 on weights near 0.02, and on 84 % of weights from
    N(0, 0.02): the inner loop would train hardly anything."""
    plain = 0.02 * torch.randn(10**6, generator=torch.Generator().manual_seed(0))
    plain = plain.to(torch.bfloat16)
    lost = (plain.float() - 1e-5).to(torch.bfloat16) == plain
    assert lost.double().mean().item() == pytest.approx(0.845, abs=0.002)
    assert lost[plain.abs() > 0.004].all()
    start = (0.016 + 0.014 * torch.rand(4096, generator=torch.Generator().manual_seed(0))).to(
        torch.bfloat16
    )

    def movement(dtype):
        module = torch.nn.ParameterList([torch.nn.Parameter(start.to(dtype, copy=True))])
        state, generator = soar.adamw_state(module), torch.Generator().manual_seed(1)
        for _ in range(200):
            module[0].grad = torch.ones_like(module[0])
            soar.adamw_step(module, state, 1e-5, Config(), generator)
        return (module[0].double() - start.double()).mean().item()

    exact = movement(torch.float32)
    assert exact == pytest.approx(-200 * 1e-5, rel=1e-3)
    assert movement(torch.bfloat16) == pytest.approx(exact, rel=0.03)
    monkeypatch.setattr(soar, "stochastic_round", lambda x, generator: x.to(torch.bfloat16))
    assert abs(movement(torch.bfloat16)) < 0.1 * abs(exact)


def test_nan_gradient_is_refused():
    """A NaN in one gradient would make every weight NaN, and the run would go on."""
    model = torch.nn.Linear(3, 2)
    before, state = soar.snapshot(model), soar.adamw_state(model)
    for bad in (math.nan, math.inf):
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        model.bias.grad[1] = bad
        with pytest.raises(UserError, match="NaN"):
            soar.adamw_step(model, state, 1e-3, Config())
        assert same(model.parameters(), before)


def test_learning_rate():
    """A first warm-up step of size zero, or a cosine that rises again after its end."""
    rates = [soar.learning_rate(1.0, step, 10, 4) for step in range(15)]
    assert rates[:5] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])
    cosine = [0.5 + 0.5 * math.cos(math.pi * i / 6) for i in range(7)]
    assert rates[4:11] == pytest.approx(cosine) and rates[10:] == pytest.approx([0.0] * 5)
    assert soar.learning_rate(8.0, 0, 2, 4) == pytest.approx(2.0)  # a run shorter than its warm-up


# ======================================================================================================================
# RLOO
# ======================================================================================================================


def flat_gradient(model) -> torch.Tensor:
    gradient = torch.cat([p.grad.flatten().double() for p in model.parameters()])
    for p in model.parameters():
        p.grad = None
    return gradient


@pytest.fixture
def update_gradient():
    """policy_update()'s gradient, as the optimizer saw it: after one step from fresh moments,
    without clipping, m is a tenth of it. A learning rate of 0 keeps the weights."""

    def gradient(policy, rollouts, advantages, **overrides):
        config = small_config(**{"kl": 0.0, "clip": 0.0, **overrides})
        advantages = torch.as_tensor(advantages, dtype=torch.float64)
        moments = soar.adamw_state(policy.model)
        soar.policy_update(policy, rollouts, advantages, moments, 0.0, config)
        return torch.cat([m.flatten().double() for m in moments["m"]]) / (1 - 0.9)

    return gradient


def slow_logprob(model, rollout: Rollout, temperature: float = 1.0):
    """What completion_logprobs() must equal: full logits of one sequence, in float64."""
    ids = rollout.prompt + rollout.completion
    logprobs = (model(input_ids=torch.tensor([ids])).logits[0].double() / temperature).log_softmax(
        -1
    )
    return sum(logprobs[t - 1, ids[t]] for t in range(len(rollout.prompt), len(ids)))


def some_rollouts(model, n: int = 4) -> list[Rollout]:
    """n completions of each of the PROMPTS, of 1 to 10 tokens, some with EOS at the end. They are
    not sampled: what is judged with them shall not need the sampler."""
    rng = random.Random(3)
    (eos,) = soar.eos_ids(model)
    rollouts = []
    for i in range(n * len(PROMPTS)):
        completion = [rng.randrange(2, 32) for _ in range(rng.randint(1, 10))]
        truncated = len(completion) == 10
        if not truncated:
            completion[-1] = eos
        rollouts.append(Rollout(PROMPTS[i // n], completion, "", truncated))
    return rollouts


def all_rollouts(prompt, vocab: int, eos: int, longest: int) -> list[Rollout]:
    """Every completion that can be sampled: up to the first EOS, or cut at `longest`."""

    def grow(prefix):
        for token in range(vocab):
            completion = prefix + [token]
            if token == eos or len(completion) == longest:
                yield Rollout(prompt, completion, "", token != eos)
            else:
                yield from grow(completion)

    return list(grow([]))


def test_rloo_advantages_leave_one_out():
    """A baseline that contains the sample itself, groups cut the wrong way, a division by the standard deviation."""
    rewards = torch.rand(12, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 120
    for G in (2, 3, 4, 6):
        expected = []
        for start in range(0, 12, G):
            group = rewards[start : start + G].tolist()
            expected += [group[i] - sum(group[:i] + group[i + 1 :]) / (G - 1) for i in range(G)]
        torch.testing.assert_close(
            soar.rloo_advantages(rewards, G), torch.tensor(expected, dtype=torch.float64)
        )


def test_equal_rewards_give_exactly_zero():
    """An advantage of 1e-15 instead of 0 would send flat groups through the forward pass."""
    for reward in (0.0, 10.0, 20.0, 120.0):
        for G in (2, 3, 7, 32):
            assert not soar.rloo_advantages(
                torch.full((2 * G,), reward, dtype=torch.float64), G
            ).any()


def test_rloo_gradient_is_unbiased_by_enumeration():
    """The expected update over all groups must be the gradient of the expected reward, exactly."""
    logits = torch.tensor([0.3, -1.0, 0.8, 0.0], dtype=torch.float64, requires_grad=True)
    rewards, p, G = (
        torch.tensor([120.0, 0.0, 10.0, 20.0], dtype=torch.float64),
        logits.softmax(0),
        3,
    )
    (true,) = torch.autograd.grad((p * rewards).sum(), logits, retain_graph=True)
    scores = torch.stack(
        [torch.autograd.grad(p[a].log(), logits, retain_graph=True)[0] for a in range(4)]
    )  # [4, 4]
    groups = torch.tensor(list(itertools.product(range(4), repeat=G)))  # [64, G]
    chances = p.detach()[groups].prod(1)  # [64]
    advantages = soar.rloo_advantages(rewards[groups].flatten(), G).view(-1, G)
    expected = torch.einsum("b,bg,bgd->d", chances, advantages, scores[groups]) / G
    torch.testing.assert_close(expected, true)


@pytest.mark.parametrize("kind", ["Llama", "Qwen2"])
@pytest.mark.parametrize("temperature, rows", [(1.0, 4096), (0.7, 7)])
def test_completion_logprobs_equal_full_logits(kind, temperature, rows):
    """Off by one position, the prompt's tokens counted in, the temperature forgotten, a chunk lost."""
    model = random_model(kind)
    rollouts = some_rollouts(model)
    expected = torch.stack([slow_logprob(model, rollout, temperature) for rollout in rollouts])
    actual = soar.completion_logprobs(model, rollouts, temperature, rows)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-4)
    weights = torch.linspace(-1, 1, len(rollouts))
    (actual * weights).sum().backward()
    gradient = flat_gradient(model)
    (expected * weights).sum().backward()
    torch.testing.assert_close(gradient, flat_gradient(model), rtol=1e-3, atol=1e-4)


class Largest(TorchDispatchMode):
    """Notes the numbers in the largest tensor that any operation makes, backward pass included."""

    numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.numbers = max(self.numbers, tensor.numel())
        return out


def test_full_logits_never_exist():
    """Logits of all tokens at once, or in chunks that are all kept for the backward pass: with a
    vocabulary of 128,000 the first thing that does not fit."""
    vocab = 997
    model = random_model(vocab=vocab)
    rollouts = some_rollouts(model, 40)
    everything = vocab * sum(len(rollout.completion) for rollout in rollouts)
    kept = []

    def keep(tensor):
        if vocab in tensor.shape and 32 not in tensor.shape:  # 32: the weights, [V, D]
            kept.append(tensor.numel())
        return tensor

    largest = Largest()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), largest:
        soar.completion_logprobs(model, rollouts, 1.0, 16).sum().backward()
    assert largest.numbers < everything / 4 and sum(kept) < everything / 4


def test_eos_is_trained(update_gradient):
    """A mask made from `token != pad` drops EOS where pad is EOS: the model never learns to stop."""
    model = random_model(eos=[0, 1])  # 0 is the pad id, too
    ended, cut = Rollout(PROMPTS[0], [9, 8, 0], "", False), Rollout(PROMPTS[0], [9, 8], "", True)
    difference = (
        soar.completion_logprobs(model, [ended], 1.0) - soar.completion_logprobs(model, [cut], 1.0)
    ).item()
    at_end = (
        model(input_ids=torch.tensor([PROMPTS[0] + [9, 8]])).logits[0, -1].log_softmax(-1)[0].item()
    )
    assert difference == pytest.approx(at_end, abs=1e-4)
    gradient, step = update_gradient(bare_policy(model), [ended], [1.0]), 0
    with torch.no_grad():
        for p in model.parameters():
            p -= 1e-4 * gradient[step : step + p.numel()].view_as(p)
            step += p.numel()
    assert (
        model(input_ids=torch.tensor([PROMPTS[0] + [9, 8]])).logits[0, -1].log_softmax(-1)[0].item()
        > at_end
    )


@pytest.mark.parametrize("kl", [0.0, 0.5])
def test_update_is_the_true_gradient_by_enumeration(kl, update_gradient):
    """The expected update over ALL completions must be the gradient of E[reward] - kl * KL(policy, reference). Guards
    against a KL estimator with another gradient (k1 as a loss: none; k3: the forward KL's), a sign, EOS left out."""
    model, reference = random_model(vocab=4, seed=0), random_model(vocab=4, seed=1)
    rollouts = all_rollouts([2, 3], vocab=4, eos=1, longest=3)
    assert len(rollouts) == 1 + 3 + 9 * 4
    rewards = torch.randn(
        len(rollouts), generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    temperature = small_config().temperature
    logp = torch.stack([slow_logprob(model, rollout, temperature) for rollout in rollouts])
    ref = torch.stack(
        [slow_logprob(reference, rollout, temperature).detach() for rollout in rollouts]
    )
    divergence = (logp.exp() * (logp - ref)).sum()
    assert divergence > 0.3
    (-(logp.exp() * rewards).sum() + kl * divergence).backward()
    true = flat_gradient(model)
    policy = bare_policy(model, reference)
    expected = sum(
        p * update_gradient(policy, [rollout], [reward], kl=kl)
        for p, rollout, reward in zip(logp.exp().tolist(), rollouts, rewards.tolist())
    )
    assert true.norm() > 0.1
    torch.testing.assert_close(expected, true, rtol=1e-3, atol=1e-5)


def test_score_function_has_mean_zero():
    """E[grad ln p] = 0 holds only when completions are whole and cut ones are not forgotten. It is also why
    k1 = ln p - ln ref as a loss would pull the policy nowhere."""
    model = random_model(vocab=4)
    logprobs = soar.completion_logprobs(model, all_rollouts([2, 3], 4, 1, 3), 0.7)
    assert logprobs.exp().sum().item() == pytest.approx(1, abs=1e-5)
    (logprobs.exp().detach() * logprobs).sum().backward()
    assert flat_gradient(model).abs().max() < 1e-5


@pytest.mark.parametrize(
    "overrides", [{"micro_tokens": 1}, {"micro_tokens": 40}, {"checkpointing": True}]
)
def test_micro_batches_do_not_change_the_gradient(overrides, update_gradient):
    """A mean over micro-batches of different sizes weighs completions by their length."""
    policy = bare_policy(random_model(), random_model(seed=1))
    rollouts = some_rollouts(policy.model)
    advantages = soar.rloo_advantages(torch.arange(12.0) ** 2 % 7, 4)
    whole = update_gradient(policy, rollouts, advantages, kl=0.1, micro_tokens=10**6)
    if overrides.get("checkpointing"):
        soar.enable_checkpointing(policy.model)
    parts = update_gradient(policy, rollouts, advantages, kl=0.1, **overrides)
    assert whole.norm() > 1 and (parts - whole).norm() < 1e-4 * whole.norm()
    assert not policy.model.training  # or the sampler would refuse


def test_micro_batches_hold_all_within_the_budget():
    """A rollout lost or used twice, or a budget that does not count padding."""
    rng = random.Random(0)
    rollouts = [
        Rollout([1] * rng.randint(1, 9), [1] * rng.randint(1, 9), "", False) for _ in range(50)
    ]
    for budget in (1, 20, 60, 10**6):
        batches = list(soar.micro_batches(rollouts, range(5, 45), budget))
        assert sorted(i for batch in batches for i in batch) == list(range(5, 45))
        for batch in batches:
            padded = len(batch) * max(
                len(rollouts[i].prompt) + len(rollouts[i].completion) for i in batch
            )
            assert padded <= budget or len(batch) == 1


def test_flat_groups_stay_in_the_denominator(update_gradient):
    """Without them a batch with one lucky group would take a step as long as a batch of successes."""
    policy = bare_policy(random_model(), random_model(seed=1))
    rollouts = some_rollouts(policy.model)
    rewards = torch.tensor([0.0, 10.0, 120.0, 0.0] * 2 + [10.0] * 4)
    alone = update_gradient(policy, rollouts[:8], soar.rloo_advantages(rewards[:8], 4), kl=0.1)
    with_flat = update_gradient(policy, rollouts, soar.rloo_advantages(rewards, 4), kl=0.1)
    assert alone.norm() > 1
    assert (with_flat - alone * 8 / 12).norm() < 1e-4 * alone.norm()


def test_sampler_gap_shows_when_another_policy_was_sampled():
    """Sampling at one temperature and training at another, or by other weights, goes unnoticed."""
    policy, config = bare_policy(random_model()), small_config(kl=0.0, temperature=0.7)
    advantages = soar.rloo_advantages(torch.arange(12.0) ** 2 % 7, 4)

    def gap(temperature):
        luck = uniforms(12, 10, 3)
        tokens, lengths, logprobs = soar.generate(policy.model, PROMPTS, 4, 10, temperature, luck)
        rollouts = []
        for i, length in enumerate(lengths):
            completion, logprob = tokens[i, :length].tolist(), logprobs[i].sum().item()
            rollouts.append(Rollout(PROMPTS[i // 4], completion, "", False, logprob))
        state = soar.adamw_state(policy.model)
        return soar.policy_update(policy, rollouts, advantages, state, 0.0, config)["sampler_gap"]

    assert gap(0.7) < 1e-5
    assert gap(1.0) > 0.05


def test_update_moves_the_weights():
    """A step down the reward, one without the moments of the last, or with its gradient left over:
    two updates are two steps of torch's AdamW."""
    policy = bare_policy(random_model())
    twin = random_model()
    rollouts = some_rollouts(twin)
    moments = soar.adamw_state(policy.model)
    optimizer = torch.optim.AdamW(twin.parameters(), lr=1e-2, weight_decay=0.0)
    config = small_config(kl=0.0, clip=0.0, temperature=1.0)
    for shift in (0, 2):
        advantages = soar.rloo_advantages((torch.arange(12.0) + shift) ** 2 % 7, 4)
        logprobs = torch.stack([slow_logprob(twin, rollout) for rollout in rollouts])
        optimizer.zero_grad()
        (-(advantages * logprobs).sum() / 12).backward()
        optimizer.step()
        soar.policy_update(policy, rollouts, advantages.double(), moments, 1e-2, config)
    moved = torch.cat([(p - q).flatten() for p, q in zip(twin.parameters(), policy.base)])
    pairs = zip(policy.model.parameters(), twin.parameters())
    error = torch.cat([(p - q).flatten() for p, q in pairs])
    assert error.norm() < 0.02 * moved.norm()


def test_update_without_signal_changes_nothing():
    """With all groups flat there is no gradient at all: moments and weights must stay, not decay."""
    policy = bare_policy(random_model(), random_model(seed=1))
    state = soar.adamw_state(policy.model)
    figures = soar.policy_update(
        policy, some_rollouts(policy.model), torch.zeros(12), state, 1.0, small_config()
    )
    assert figures == {"grad_norm": 0.0, "kl": 0.0, "sampler_gap": 0.0} and state["t"] == 0
    assert same(policy.model.parameters(), policy.base)


# ======================================================================================================================
# Inner loop
# ======================================================================================================================


def test_student_depends_on_its_key_alone(policy):
    """Students in one stream of random numbers would depend on how many were trained before them."""
    dataset, config, students = single_products(soar.make_world(0))[:6], small_config(), []
    for key in ((0, "a"), (0, "b"), (0, "a")):
        soar.restore(policy.model, policy.base)
        students.append(trained(policy, dataset, 3, config, key))
    assert (
        same(students[0], students[2])
        and not same(students[0], students[1])
        and not same(students[0], policy.base)
    )


def test_batches():
    """Drawing with replacement, one order for all epochs, or a last batch that is too small."""
    batches = soar.batches_of(
        list(range(6)), 6, 4, soar.seeded("order")
    )  # 6 batches of 4 are 4 epochs of 6
    flat = sum(batches, [])
    assert list(map(len, batches)) == [4] * 6
    assert (
        all(sorted(flat[i : i + 6]) == list(range(6)) for i in range(0, 24, 6))
        and flat[:6] != flat[6:12]
    )


def test_student_goes_on_where_it_stopped(policy):
    """A student resumed with fresh moments, or with the first batch again, is another student."""
    dataset, config, key = single_products(soar.make_world(0))[:6], small_config(), (0, "a")
    whole = trained(policy, dataset, 4, config, key)
    soar.restore(policy.model, policy.base)
    order = soar.seeded(*key, "order")
    batches = soar.batches_of(dataset, 4, config.student_batch, order)
    moments = soar.adamw_state(policy.model)

    def steps(first, last):
        for step in range(first, last):
            lr = soar.learning_rate(config.student_lr, step, 4, config.student_warmup)
            soar.student_step(policy, batches[step], moments, lr, config, (*key, step))

    steps(0, 2)
    kept = soar.snapshot(policy.model)
    moments = copy.deepcopy(moments)
    soar.restore(policy.model, policy.base)
    soar.restore(policy.model, kept)
    steps(2, 4)
    assert same(soar.snapshot(policy.model), whole) and not same(kept, whole)


# ======================================================================================================================
# Teacher
# ======================================================================================================================


@pytest.mark.parametrize(
    "text, expected",
    [
        (r"<question>2+3?</question><answer>\boxed{5}</answer>", ("2+3?", "5")),
        (
            "Sure!\n<question>\n2+3\nor so?\n</question>\nis\n<answer>\n$\\boxed{5}$.\n</answer> Bye.",
            ("2+3\nor so?", "5"),
        ),
        (
            r"<question>1</question><answer>\boxed{1}</answer> <question>2</question><answer>\boxed{2}</answer>",
            ("1", "1"),
        ),
        (r"<question>1?</question><answer>\boxed{7} no, \boxed{1}</answer>", ("1?", "1")),
        (r"<question>1?<answer>\boxed{1}</answer>", None),
        (r"1?</question><answer>\boxed{1}</answer>", None),
        (r"<question>1?</question><answer>\boxed{1}", None),
        (r"<question>1?</question>\boxed{1}", None),
        (r"<answer>\boxed{1}</answer><question>1?</question>", None),
        (r"<question>1?</question><answer>1</answer>", None),
        (r"<question>\boxed{1}</question><answer>1</answer>", None),
        (r"<question>1?</question><answer>1</answer> \boxed{1}", None),
        (r"<question>1?</question><answer>\boxed{1</answer>", None),
        (r"<question>  </question><answer>\boxed{1}</answer>", None),
        (r"<question>1?</question><answer>\boxed{ }</answer>", None),
        (r"<question>1?</question><answer>\boxed{}</answer>", None),
        (r"<question>1?</question><answer>\boxed{hello world}</answer>", None),
        (r"<question>1?</question><question>2?</question><answer>\boxed{2}</answer>", ("2?", "2")),
        (r"<question>1? <question>2?</question><answer>\boxed{2}</answer>", ("2?", "2")),
        (
            r"<question>1?</question><answer>\boxed{1}<question>2?</question><answer>\boxed{2}</answer>",
            ("2?", "2"),
        ),
        (r"<question>1?</question> so <question>2? <answer>\boxed{2}</answer>", None),
        (r"<question>1?</question><answer> <answer>\boxed{1}</answer>", None),
        (
            r"<question>1?</question><answer>1</answer><question>2?</question><answer>\boxed{2}</answer>",
            None,
        ),
    ],
)
def test_parse_problem(text, expected):
    """A problem without a question, or with a key that no student can meet, wastes a place in the dataset."""
    assert soar.parse_problem(text) == (expected and Problem(*expected))


def first_pair(text: str) -> Problem | None:
    """parse_problem by its definition: every question is tried with every answer behind it."""

    def opens_between(start: int, end: int) -> bool:
        return "<question>" in text[start:end] or "<answer>" in text[start:end]

    starts = [m.end() for m in re.finditer("<question>", text)]
    answers = [m.end() for m in re.finditer("<answer>", text)]
    for start, answer in itertools.product(starts, answers):
        closed, end = text.find("</question>", start), text.find("</answer>", answer)
        opening = answer - len("<answer>")
        if (
            closed < 0
            or end < 0
            or not closed < opening
            or opens_between(start, opening)
            or opens_between(answer, end)
        ):
            continue
        box = extract_boxed(text[answer:end])
        useful = text[start:closed].strip() and box is not None and parses(box)
        return Problem(text[start:closed].strip(), box) if useful else None
    return None


def test_parse_problem_against_its_definition():
    """Another question's answer, in some order of tags that nobody thought of."""
    rng, outcomes = random.Random(0), Counter()
    pieces = [
        "<question>",
        "</question>",
        "<answer>",
        "</answer>",
        r"\boxed{1}",
        r"\boxed{2}",
        "3+4?",
        " ",
    ]
    pieces += ["<question>5?</question>", r"<answer>\boxed{6}</answer>"]
    for _ in range(20000):
        text = "".join(rng.choices(pieces, k=rng.randint(2, 14)))
        found = soar.parse_problem(text)
        assert found == first_pair(text), text
        outcomes[found is not None] += 1
    assert outcomes[True] > 1000 and outcomes[False] > 1000


@pytest.mark.parametrize(
    "piece",
    [
        "<question>",
        "</question>",
        "<answer>",
        "</answer>",
        "<question>1?</question>",
        "<question></answer>",
        "<question>1?</question><answer>",
        r"<answer>\boxed{1}</answer>",
        r"</question>\boxed{",
        "<question>1?</question></answer>",
    ],
)
def test_parse_problem_takes_linear_time(piece):
    """2,048 repeated tags took a minute, which a teacher's first samples can cost many times over."""
    start = time.process_time()
    assert soar.parse_problem(piece * 2048) is None
    assert (
        soar.parse_problem("<question>1?</question>" + piece * 8192) is None or "<answer>" in piece
    )
    assert time.process_time() - start < 1


def test_propose_resamples_until_full(policy):
    """Rejected completions must be replaced, be counted, and stay out of the update."""
    config = small_config(temperature=1.6)
    rollouts, problems, figures = soar.propose(policy, 30, config, soar.seeded("propose"))
    assert len(rollouts) == len(problems) == 30 and 0.2 < figures["acceptance"] < 1
    assert [soar.parse_problem(rollout.text) for rollout in rollouts] == problems
    again = soar.propose(policy, 30, config, soar.seeded("propose"))[0]
    assert again == rollouts


def test_prompt_that_opens_the_question(policy):
    """A prompt that ends in <question> must not make every completion unreadable, nor the tag part of a question."""
    policy.teacher_text = "Teacher: <question>\n"
    _, problems, figures = soar.propose(policy, 8, small_config(), soar.seeded("opens"))
    assert figures["acceptance"] > 0.5
    assert all("<" not in problem.question for problem in problems)


def test_hopeless_teacher(policy):
    """A teacher that never keeps to the format must end in advice, not in an endless loop."""
    policy.teacher_text = "User: a= 4*5 Assistant:"
    with pytest.raises(UserError, match="0 of .*--teacher-prompt.*boxed"):
        soar.propose(policy, 4, small_config(), soar.seeded("hopeless"))


def test_proposition_1_by_enumeration():
    """A correction for rejected proposals that RLOO does not need, or none where REINFORCE needs it;
    and the promise that the KL term, which the proposition leaves out, spoils nothing at 0.001."""
    logits = torch.tensor([0.3, -1.0, 0.8, 0.0, 0.5], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([0.0, 0.5, 0.0, 0.6, -0.4], dtype=torch.float64).log_softmax(0)
    rewards = torch.tensor([0.2, 9.0, -0.1, 0.4, 9.0], dtype=torch.float64)
    accepted = [0, 2, 3]
    G = 3
    pi_0 = logits.softmax(0)
    pi = pi_0 / pi_0[accepted].sum()
    reference_of_accepted = reference - reference[accepted].logsumexp(0)
    groups = torch.tensor(list(itertools.product(accepted, repeat=G)))  # [27, G]
    chances = pi.detach()[groups].prod(1)
    assert chances.sum().item() == pytest.approx(1)
    advantages = soar.rloo_advantages(rewards[groups].flatten(), G).view(-1, G)

    def gradient(value):
        return torch.autograd.grad(value, logits, retain_graph=True)[0]

    def update(weights, p):
        """The expected update: over all groups, with sum_i w_i grad ln p_i / G of each."""
        scores = torch.stack([gradient(p[action].log()) for action in range(5)])
        return torch.einsum("b,bg,bgd->d", chances, weights, scores[groups]) / G

    true = gradient((pi * rewards)[accepted].sum())
    torch.testing.assert_close(update(advantages, pi_0), update(advantages, pi))
    torch.testing.assert_close(update(advantages, pi_0), true)
    torch.testing.assert_close(update(rewards[groups], pi), true)
    assert (update(rewards[groups], pi_0) - true).norm() > 0.1 * true.norm()
    k1 = (pi_0.log() - reference).detach()[groups]
    divergence = (pi * (pi.log() - reference_of_accepted))[accepted].sum()
    for kl, error in ((0.001, 0.0007), (0.5, 0.16)):
        true = gradient((pi * rewards)[accepted].sum() - kl * divergence)
        missing = update(advantages - kl * k1, pi_0) - true
        assert (missing.norm() / true.norm()).item() == pytest.approx(error, rel=0.05)


LOGITS = torch.tensor([0.3, -1.0, 0.8, 0.0, 0.5], dtype=torch.float64)
REFERENCE = torch.tensor([0.0, 0.5, 0.0, 0.6, -0.4], dtype=torch.float64)
ACCEPTED = [0, 2, 3]


@pytest.fixture
def added(monkeypatch):
    """The functions that assignment A4 adds: a student's or, beside soar.py, the solution."""
    for name in ("rejection_gap", "kl_gap"):
        if not hasattr(soar, name) and Path(soar.__file__).resolve() == ROOT / "soar.py":
            define(monkeypatch, SOLUTIONS[name])


def test_rejection_gap(added):
    """A gap of weights whose mean is zero, none of others; ln pi_0 where ln pi is meant."""
    logits = LOGITS.clone().requires_grad_()
    pi_0 = logits.softmax(0)
    pi = pi_0 / pi_0[ACCEPTED].sum()
    rewards = torch.tensor([0.2, 9.0, -0.1, 0.4, 9.0], dtype=torch.float64)
    chances = pi.detach()[ACCEPTED]
    for weights in (rewards, rewards - (chances * rewards[ACCEPTED]).sum(), rewards * 0 + 1):
        expected = torch.zeros(5, dtype=torch.float64)
        for action in ACCEPTED:
            for p, sign in ((pi_0, 1), (pi, -1)):
                (score,) = torch.autograd.grad(p[action].log(), logits, retain_graph=True)
                expected += sign * pi[action].item() * weights[action] * score
        found = soar.rejection_gap(LOGITS.clone(), ACCEPTED, weights)
        torch.testing.assert_close(found.detach(), expected)


@pytest.mark.parametrize("kl", [0.0, 0.001, 0.5])
def test_kl_gap(kl, added):
    """A KL term over all actions instead of the accepted ones, or a gap with the wrong sign: the
    expected update is enumerated over all groups."""
    logits = LOGITS.clone().requires_grad_()
    pi_0 = logits.softmax(0)
    pi = pi_0 / pi_0[ACCEPTED].sum()
    log_reference = REFERENCE.log_softmax(0)
    rewards = torch.tensor([0.2, 9.0, -0.1, 0.4, 9.0], dtype=torch.float64)
    groups = torch.tensor(list(itertools.product(ACCEPTED, repeat=3)))
    chances = pi.detach()[groups].prod(1)
    advantages = rewards[groups] - (rewards[groups].sum(1, keepdim=True) - rewards[groups]) / 2
    scores = torch.eye(5, dtype=torch.float64) - pi_0.detach()  # row a: grad ln pi_0(a)

    def update(advantages):
        weights = advantages - kl * (pi_0.log() - log_reference).detach()[groups]
        return torch.einsum("b,bg,bgd->d", chances, weights, scores[groups]) / 3

    of_accepted = log_reference - log_reference[ACCEPTED].logsumexp(0)
    aim = (pi * rewards)[ACCEPTED].sum() - kl * (pi * (pi.log() - of_accepted))[ACCEPTED].sum()
    expected = update(advantages) - torch.autograd.grad(aim, logits)[0]
    assert (expected.norm() > 1e-6) == (kl > 0)
    found = soar.kl_gap(LOGITS.clone(), ACCEPTED, REFERENCE.clone(), kl)
    torch.testing.assert_close(found.detach(), expected)


# ======================================================================================================================
# Reward and promotion
# ======================================================================================================================


@pytest.mark.parametrize(
    "rewards, index",
    [
        ([0.3], 0),
        ([0.3, 0.1], 0),
        ([0.1, 0.3], 1),
        ([0.3, 0.1, 0.2], 2),
        ([-0.2, 0.1, -0.5], 0),
        ([0.4, 0.1, 0.3, 0.2], 2),
        ([0.1, 0.2, 0.3, 0.4], 2),
    ],
)
def test_median_student(rewards, index):
    """The best student of the best dataset is partly luck: the paper takes the median one."""
    assert soar.median_student(rewards) == index


@pytest.mark.parametrize(
    "history, window, tau, due",
    [
        ([0.5], 3, 0.25, False),
        ([0.5, 0.5], 3, 0.25, False),
        ([0.5, 0.5, 0.5], 3, 0.25, True),
        ([0.25, 0.25, 0.25], 3, 0.25, False),
        ([0.5, 0.25, 0.25], 3, 0.25, True),
        ([9, 0, 0, 0], 3, 0.25, False),
        ([-9, 0.5, 0.5, 0.5], 3, 0.25, True),
        ([0.5], 1, 0.25, True),
        ([0.25], 1, 0.25, False),
        ([], 1, -1.0, False),
        ([-0.5, -0.25], 2, -1.0, True),
    ],
)
def test_promotion_due(history, window, tau, due):
    """One lucky first step, a mean of exactly tau, or steps from before the window must not promote."""
    assert bool(soar.promotion_due(history, Config(window=window, tau=tau))) is due
    assert not soar.promotion_due(history, Config(window=window, tau=tau, promotion=False))


def fresh_state(policy, **fields) -> soar.State:
    return soar.State(policy.base, soar.adamw_state(policy.model), policy.base, **fields)


def test_teacher_moments_are_held_once(policy, monkeypatch):
    """Old moments that stay on the host while the new ones arrive there: 16 bytes a weight. And
    moments on the GPU while students train with their own: 22 instead of 14."""
    with torch.device("meta"):
        elsewhere = torch.nn.Linear(3, 2)
    for device in ("cpu", None):
        moments, device = soar.adamw_state(elsewhere, device), device or "meta"
        assert {x.device.type for x in moments["m"] + moments["v"]} == {device}
    state, config, update, held = fresh_state(policy), small_config(), soar.policy_update, []

    def spy(*args):
        held.append(state.moments)
        return update(*args)

    monkeypatch.setattr(soar, "policy_update", spy)
    rollouts = soar.sample(policy, [policy.teacher_prompt()], 4, 12, config, soar.seeded(0))
    soar.teacher_update(policy, rollouts, torch.tensor([1.0, -1.0, 1.0, -1.0]), state, config)
    assert held == [{}] and state.moments["t"] == 1 and any(x.any() for x in state.moments["m"])


def test_grounded_rewards(policy, monkeypatch):
    """A student that starts from the one before it, rewards against the base and not the baseline, other questions."""
    world = soar.make_world(0)
    config, datasets = (
        small_config(student_lr=1e-2, inner_extra=1, student_group=16),
        [single_products(world)[:4], single_products(world)[4:8]],
    )
    soar.restore(policy.model, policy.base)
    baseline = trained(policy, single_products(world)[8:12], 3, config, ("another",))
    state, asked, steps_taken = fresh_state(policy, step=5, promotions=1), [], []
    state.baseline = baseline
    questions, right, train = (
        single_products(world)[:10] + single_sums()[:6],
        soar.greedy_right,
        soar.train_student,
    )
    monkeypatch.setattr(soar, "greedy_right", lambda *args: asked.append(args[1]) or right(*args))
    monkeypatch.setattr(
        soar, "train_student", lambda *args: steps_taken.append(len(args[1])) or train(*args)
    )
    rewards, errors, champion, figures = soar.grounded_rewards(
        policy, datasets, questions, state, config
    )
    assert asked == [questions] * (1 + 2 * 2) and steps_taken == [2 + 1] * 4
    assert rewards.shape == errors.shape == (2, 2) and rewards.abs().sum() > 0
    soar.restore(policy.model, baseline)
    before = right(policy, questions, config)
    assert figures["accuracy_before"] == before.mean().item()
    students = {}
    for k, j in itertools.product(range(2), range(2)):
        soar.restore(policy.model, baseline)
        students[k, j] = trained(policy, datasets[k], 3, config, (config.seed, "student", 5, k, j))
        gain = right(policy, questions, config) - before
        assert rewards[k, j].item() == gain.mean().item()
        assert errors[k, j].item() == pytest.approx(gain.std(correction=0).item() / 4)
    others = [same(champion.weights, weights) for weights in students.values()]
    # One that met only flat groups stays the baseline, so several can be the same.
    assert same(champion.weights, students[champion.dataset, champion.student])
    assert sum(others) < 4


def test_learnability_rewards(policy, monkeypatch):
    """A problem that the student never solves is worth nothing; one that it solves at rate s is worth 1 - s."""
    times = {"never": 0, "once": 1, "half": 16, "always": 32}
    monkeypatch.setattr(
        soar,
        "solve",
        lambda policy, problems, n, *_: (
            [],
            torch.tensor(
                [
                    RIGHT if i < times[problem.question] else 10.0
                    for problem in problems
                    for i in range(n)
                ]
            ).double(),
        ),
    )
    datasets = [
        [Problem("never", "1"), Problem("half", "1")],
        [Problem("once", "1"), Problem("always", "1")],
    ]
    state, config = fresh_state(policy), small_config()
    rewards, errors, champion, figures = soar.learnability_rewards(policy, datasets, state, config)
    torch.testing.assert_close(rewards, torch.tensor([[0.25], [31 / 64]], dtype=torch.float64))
    assert (
        champion is None
        and errors.shape == rewards.shape
        and figures["success"] == pytest.approx(49 / 128)
    )


# ======================================================================================================================
# Outer loop
# ======================================================================================================================


@pytest.mark.parametrize("tau", [10.0, -10.0])
def test_outer_step(tau, policy, tmp_path):
    """Without a promotion the baseline stays to the bit; with one it is the champion. Teacher and student never mix."""
    config = small_config(tau=tau, student_lr=1e-2, out=str(tmp_path), seed=7)
    hard_train, state = single_products(soar.make_world(0)) + single_sums(), fresh_state(policy)
    row = soar.outer_step(policy, hard_train, state, config)
    questions = state.questions
    assert len({sum(rewards) for rewards in row["rewards"]}) > 1, (
        "no signal for the teacher: take another seed"
    )
    assert not same(state.teacher, policy.base) and state.moments["t"] == 1 and state.step == 1
    assert same(policy.reference.parameters(), policy.base) and state.log == [row]
    assert [q["dataset"] for q in questions] == [0] * 4 + [1] * 4 and {
        q["step"] for q in questions
    } == {0}
    if tau > 0:
        assert (
            same(state.baseline, policy.base)
            and state.history == [row["reward"]]
            and row["promotion"] is None
        )
        assert not list(tmp_path.iterdir())
    else:
        k, j = row["promotion"]["dataset"], row["promotion"]["student"]
        soar.restore(policy.model, policy.base)
        dataset = [Problem(q["question"], q["answer"]) for q in questions if q["dataset"] == k]
        assert same(state.baseline, trained(policy, dataset, 2, config, (7, "student", 0, k, j)))
        assert state.history == [] and state.promotions == 1
        assert [Problem(**row) for row in state.promotion_questions] == dataset
        assert same(
            soar.load_model(str(tmp_path / "student"), config)[0].parameters(), state.baseline
        )


def test_teacher_moves_towards_the_better_dataset(policy, tmp_path, monkeypatch):
    """An advantage with the wrong sign, or one that lands on the problems of another dataset."""
    config, seen, propose = (
        small_config(teacher_batch=2, kl=0.0, out=str(tmp_path), promotion=False),
        [],
        soar.propose,
    )
    monkeypatch.setattr(soar, "propose", lambda *args: seen.append(propose(*args)) or seen[0])
    rewards = torch.tensor(
        [[0.5, 0.3], [0.0, 0.0], [-0.2, -0.2], [-0.1, -0.1]]
    ).double()  # two groups of two datasets
    monkeypatch.setattr(
        soar,
        "grounded_rewards",
        lambda *_: (rewards, rewards * 0, soar.Champion(0, 0, policy.base), {}),
    )
    state = fresh_state(policy)
    soar.outer_step(policy, single_sums(), state, config)
    rollouts = seen[0][0]
    after, before = [], []
    for weights, result in ((policy.base, before), (state.teacher, after)):
        soar.restore(policy.model, weights)
        with torch.no_grad():
            result += (
                soar.completion_logprobs(policy.model, rollouts, 1.0).view(4, 4).sum(1).tolist()
            )
    change = [b - a for a, b in zip(before, after)]
    assert change[0] > change[1] and change[3] > change[2]


def test_best_promoted_student_is_kept(policy, tmp_path, monkeypatch):
    """A later promotion that is worse on the hard train set becomes the baseline, but not the reported student."""
    config, state = small_config(out=str(tmp_path)), fresh_state(policy, history=[0.5])
    accuracies, kept = iter([0.5, 0.25, 0.75]), []
    monkeypatch.setattr(soar, "greedy_right", lambda *_: torch.tensor([next(accuracies)]))
    for i in range(3):
        weights = [w + i for w in policy.base]
        soar.promote(
            policy, soar.Champion(0, 0, weights), [[Problem(str(i), "1")]], [], state, config
        )
        saved = soar.snapshot(soar.load_model(str(tmp_path / "student"), config)[0])
        kept.append(round((saved[0] - policy.base[0]).mean().item()))
        assert same(state.baseline, weights)
    assert kept == [0, 0, 2] and state.promotions == 3 and state.best_accuracy == 0.75
    assert [row["question"] for row in state.promotion_questions] == ["0", "1", "2"]


# ==================================================================================================
# SOAR on a toy: a policy that can be computed by hand
# ==================================================================================================

# Whatever a solution of these functions looks like, it reaches the language model through sample()
# and completion_logprobs() alone. Here a table stands behind both. There are twelve facts. The
# teacher writes a problem about one of them, by a softmax over `writes` (the last entry: something
# that is no problem); a student knows a fact, that is, answers greedily right, where its entry of
# `knows` is above 0. All else is real: training, rewards, promotion, in milliseconds.

FACTS = 12


class Bandit(torch.nn.Module):
    """The table that is trained like a model."""

    device = torch.device("cpu")

    def __init__(self):
        super().__init__()
        self.writes = torch.nn.Parameter(torch.zeros(FACTS + 1))
        self.knows = torch.nn.Parameter(torch.full((FACTS,), -0.2))

    def scores(self):
        """[1 + FACTS, FACTS + 1] logits: row 0 the teacher's, row 1 + f those of fact f."""
        table = torch.full((1 + FACTS, FACTS + 1), -1e9)
        table[0] = self.writes
        table[1:, 0] = 0.0  # a wrong answer
        table[1:, 1] = self.knows  # the right one
        return table

    def save_pretrained(self, folder):
        Path(folder).mkdir(parents=True, exist_ok=True)
        torch.save(self.state_dict(), Path(folder) / "weights.pt")


class ToyPolicy(soar.Policy):
    """A prompt is one token: 0 for the teacher, 1 + f for fact f."""

    def teacher_prompt(self):
        return [0]

    def student_prompt(self, problem):
        return [1 + int(problem.question.split()[1])]


def about_facts(*facts: int) -> list[Problem]:
    return [Problem(f"fact {fact}", str(fact)) for fact in facts]


def table_of(writes=0.0, knows=-0.2) -> list[torch.Tensor]:
    """Weights of the toy; a number stands for all entries."""
    writes = torch.as_tensor(writes, dtype=torch.float32).expand(FACTS + 1)
    return [writes.clone(), torch.as_tensor(knows, dtype=torch.float32).expand(FACTS).clone()]


@pytest.fixture
def toy_policy(monkeypatch):
    """A policy that plays on the table. Its `asked` lists the facts of greedy questions."""
    model = Bandit()
    words = types.SimpleNamespace(save_pretrained=lambda folder: None, chat_template=None)
    policy = ToyPolicy(
        model,
        copy.deepcopy(model),
        words,
        "",
        "{problem}",
        False,
        soar.snapshot(model),
        soar.Meter(),
    )
    policy.asked = []

    def text_of(place, token):
        if place:
            return rf"\boxed{{{place - 1}}}" if token == 1 else r"\boxed{99}"
        if token == FACTS:
            return "no problem"
        return rf"<question>fact {token}</question><answer>\boxed{{{token}}}</answer>"

    def sample(policy, prompts, copies, max_new_tokens, config, generator=None):
        scores = policy.model.scores().detach() / config.temperature
        rollouts = []
        for (place,) in prompts:
            tokens = [int(scores[place].argmax())] * copies
            if generator is None:
                policy.asked.append(place - 1)
            else:
                chances = scores[place].softmax(0)
                tokens = torch.multinomial(chances, copies, True, generator=generator).tolist()
            logprobs = scores[place].log_softmax(0).tolist()
            for token in tokens:
                text = text_of(place, token)
                rollouts.append(Rollout([place], [token], text, False, logprobs[token]))
        return rollouts

    def completion_logprobs(model, rollouts, temperature, rows=512):
        logprobs = (model.scores() / temperature).log_softmax(-1)
        places = [rollout.prompt[0] for rollout in rollouts]
        return logprobs[places, [rollout.completion[0] for rollout in rollouts]]

    monkeypatch.setattr(soar, "sample", sample)
    monkeypatch.setattr(soar, "completion_logprobs", completion_logprobs)
    return policy


def toy_config(**overrides) -> Config:
    """Six steps of 0.1 lift a fact that is trained in each of them from -0.2 to above 0."""
    sizes = dict(
        dataset="toy.jsonl",
        temperature=1.0,
        kl=0.0,
        inner_steps=6,
        student_lr=0.1,
        student_group=16,
        reward_questions=4,
        teacher_lr=0.5,
    )
    return small_config(**sizes | overrides)


def toy_accuracy(weights: list[torch.Tensor], facts: list[int]) -> float:
    """The share of these facts that a student with these weights answers greedily right."""
    return (weights[1][facts] > 0).double().mean().item()


def test_grounded_rewards_on_the_toy(toy_policy):
    """Gains over the base model and not over the baseline, a student that goes on from the one
    before it or from the teacher, other questions after than before, a wrong standard error."""
    knows = [1.0] + [-0.2] * 11
    state = fresh_state(toy_policy, promotions=0)
    state.baseline = table_of(knows=knows)
    soar.restore(toy_policy.model, table_of(knows=3.0))  # whatever the live model was before
    datasets = [about_facts(1, 1, 1, 1), about_facts(1, 2, 1, 2), about_facts(8, 9, 8, 9)]
    questions = about_facts(0, 1, 2, 3)
    rewards, errors, champion, figures = soar.grounded_rewards(
        toy_policy, datasets, questions, state, toy_config()
    )
    expected = torch.tensor([[0.25] * 2, [0.5] * 2, [0.0] * 2], dtype=torch.float64)
    torch.testing.assert_close(rewards.double(), expected)
    # Over the four questions the gains are 0 1 0 0, 0 1 1 0, 0 0 0 0.
    deviations = torch.tensor([[3**0.5 / 4] * 2, [0.5] * 2, [0.0] * 2], dtype=torch.float64)
    torch.testing.assert_close(errors.double(), deviations / 4**0.5)
    assert champion.dataset == 1 and figures["accuracy_before"] == pytest.approx(0.25)
    assert (champion.weights[1] > 0).nonzero()[:, 0].tolist() == [0, 1, 2]
    assert same(state.baseline, table_of(knows=knows)) and set(toy_policy.asked) == {0, 1, 2, 3}


def test_inner_extra_on_the_toy(toy_policy):
    """Steps after a promotion that are forgotten, or that the first promotion alone brings."""
    gains = []
    for promotions in range(3):
        state = fresh_state(toy_policy, promotions=promotions)
        config = toy_config(inner_steps=1, inner_extra=2, student_lr=0.08)
        rewards, *_ = soar.grounded_rewards(
            toy_policy, [about_facts(1, 1, 1, 1)] * 2, about_facts(1), state, config
        )
        gains.append(rewards.mean().item())
    # The rates of 1, 3 and 5 steps add up to 1, 2 and 3 peaks: 0.08, 0.16 and 0.24.
    assert gains == [0.0, 0.0, 1.0]


def test_champion_on_the_toy(toy_policy):
    """The best single student, a student of another dataset, weights that are not its own."""
    questions, lucky = [1, 2, 3, 4, 5, 6], 0
    datasets = [about_facts(1, 2, 3, 4), about_facts(3, 4, 5, 6), about_facts(1, 2, 5, 6)]
    for seed in range(12):
        # Two attempts are often alike, and then teach nothing: much luck.
        config = toy_config(
            seed=seed, repeats=3 + seed % 2, inner_steps=3, student_group=2, student_lr=0.2
        )
        state = fresh_state(toy_policy, step=seed)
        rewards, _, champion, _ = soar.grounded_rewards(
            toy_policy, datasets, about_facts(*questions), state, config
        )
        means = rewards.mean(1).tolist()
        row = rewards[champion.dataset].tolist()
        assert means[champion.dataset] == pytest.approx(max(means))
        median = sorted(row)[len(row) // 2]
        assert row[champion.student] == pytest.approx(median)
        assert toy_accuracy(champion.weights, questions) == pytest.approx(median)
        lucky += median < max(row) and max(row) > min(row)
    assert lucky > 2


def test_promote_on_the_toy(toy_policy, tmp_path):
    """A window that goes on over a promotion, a dataset that D_best lacks, and a later promotion
    that is worse on the hard set and still replaces the student that is kept."""
    config = toy_config(out=str(tmp_path))
    hard_train = about_facts(0, 1, 2, 3)
    state = fresh_state(toy_policy)
    kept = []
    for number, known in enumerate((2, 1, 3)):
        weights = table_of(knows=[1.0] * known + [-1.0] * (FACTS - known))
        datasets = [about_facts(11), about_facts(number, number + 1)]
        state.history = [0.5, 0.25]
        row = soar.promote(
            toy_policy, soar.Champion(1, 1, weights), datasets, hard_train, state, config
        )
        assert same(state.baseline, weights) and list(state.history) == []
        assert (row["dataset"], row["student"]) == (1, 1)
        assert row["accuracy"] == pytest.approx(known / 4)
        kept.append(torch.load(tmp_path / "student" / "weights.pt")["knows"].gt(0).sum().item())
    assert kept == [2, 2, 3] and state.promotions == 3
    assert state.best_accuracy == pytest.approx(0.75)
    assert state.student_key == soar.weights_key(state.baseline)
    questions = [Problem(**row) for row in state.promotion_questions]
    assert questions == about_facts(0, 1, 1, 2, 2, 3)


@pytest.mark.parametrize("tau", [10.0, -10.0])
def test_outer_step_on_the_toy(tau, toy_policy, tmp_path):
    """Problems by the student instead of the teacher, students that start from the teacher, a
    promotion that is due and does not come or the other way round, books that do not agree."""
    config = toy_config(tau=tau, out=str(tmp_path), seed=7, n=3, repeats=1)
    state = fresh_state(toy_policy)
    state.teacher = table_of(writes=[-9.0, 5, 5, 5] + [-9.0] * 9)  # it writes about three facts
    before = copy.deepcopy(state.teacher)
    row = soar.outer_step(toy_policy, about_facts(*range(8)), state, config)
    facts = [int(question["answer"]) for question in state.questions]
    assert set(facts) <= {1, 2, 3} and len(facts) == 2 * 3
    assert [question["dataset"] for question in state.questions] == [0] * 3 + [1] * 3
    assert {question["step"] for question in state.questions} == {0}
    rewards = torch.tensor(row["rewards"])
    assert rewards.shape == torch.tensor(row["errors"]).shape == (2, 1)
    for question in state.questions:
        assert question["reward"] == pytest.approx(rewards[question["dataset"]].mean().item())
    mean = rewards.mean().item()
    assert row["reward"] == pytest.approx(mean) and row["average"] == pytest.approx(mean)
    assert state.step == 1 and list(state.log) == [row] and row["step"] == 0
    assert state.moments["t"] <= 1 and same(before[1:], state.teacher[1:])
    if tau > 0:
        assert same(state.baseline, toy_policy.base) and row["promotion"] is None
        assert list(state.history) == pytest.approx([mean]) and not list(tmp_path.iterdir())
    else:
        k = row["promotion"]["dataset"]
        assert rewards[k].mean() == rewards.mean(1).max()
        dataset = [
            Problem(q["question"], q["answer"]) for q in state.questions if q["dataset"] == k
        ]
        assert [Problem(**row) for row in state.promotion_questions] == dataset
        known = (state.baseline[1] > toy_policy.base[1]).nonzero()[:, 0].tolist()
        assert known == sorted({int(problem.answer) for problem in dataset})
        assert torch.equal(state.baseline[0], toy_policy.base[0])  # no teacher in the student
        assert state.promotions == 1 and list(state.history) == []


def test_a_late_promotion_on_the_toy(toy_policy, tmp_path):
    """A promotion after one lucky step; and after a promotion a window that begins anew."""
    config = toy_config(tau=-10.0, window=2, out=str(tmp_path), n=2, repeats=1)
    state = fresh_state(toy_policy)
    promoted = []
    for _ in range(5):
        row = soar.outer_step(toy_policy, about_facts(*range(FACTS)), state, config)
        promoted.append(row["promotion"] is not None)
    assert promoted == [False, True, False, True, False]
    rewards = [row["reward"] for row in state.log]
    averages = [row["average"] for row in state.log]
    expected = [rewards[0], sum(rewards[:2]) / 2, rewards[2], sum(rewards[2:4]) / 2, rewards[4]]
    assert averages == pytest.approx(expected) and list(state.history) == pytest.approx(rewards[4:])
    assert [row["step"] for row in state.log] == [0, 1, 2, 3, 4]


def test_questions_on_the_toy(toy_policy, tmp_path):
    """The same hard problems in every step, other ones for each student, one asked twice, or
    proposals that repeat those of the step before."""
    config = toy_config(tau=10.0, out=str(tmp_path), n=4, repeats=2, inner_steps=1)
    state = fresh_state(toy_policy)
    asked, written = [], []
    for step in range(4):
        toy_policy.asked.clear()
        soar.outer_step(toy_policy, about_facts(*range(10)), state, config)
        assert len(set(Counter(toy_policy.asked).values())) == 1  # the same before and after
        asked.append(frozenset(toy_policy.asked))
        written.append(tuple(q["answer"] for q in state.questions if q["step"] == step))
    assert {len(facts) for facts in asked} == {4} and len(set(asked)) > 2 and len(set(written)) == 4


def test_teacher_on_the_toy(toy_policy, tmp_path):
    """An advantage with the wrong sign, one that lands on the problems of another dataset, or one
    that compares datasets of different groups."""
    checked = 0
    for seed in range(6):
        config = toy_config(
            seed=seed,
            tau=10.0,
            out=str(tmp_path),
            n=4,
            repeats=1,
            teacher_batch=2,
            reward_questions=8,
        )
        state = fresh_state(toy_policy)
        before = copy.deepcopy(state.teacher)
        row = soar.outer_step(toy_policy, about_facts(*range(8)), state, config)
        a, b, c, d = [rewards[0] for rewards in row["rewards"]]  # two groups of two datasets
        advantages = [a - b, b - a, c - d, d - c]
        # Advantages sum to zero; so a logit's gradient is the sum over the problems about its fact.
        gradient = torch.zeros(FACTS + 1)
        for question in state.questions:
            gradient[int(question["answer"])] += advantages[question["dataset"]]
        clear = gradient.abs() > 0.01
        moved = state.teacher[0] - before[0]
        assert torch.equal(moved[clear].sign(), gradient[clear].sign())
        checked += clear.sum().item()
    assert checked > 15


# ======================================================================================================================
# The run folder and main
# ======================================================================================================================


@pytest.fixture(scope="session")
def toy(base, cache, tmp_path_factory):
    """Flags of a short run on a file of problems: 6 outer steps, rewards that are not zero, 3 promotions."""
    folder = tmp_path_factory.mktemp("toy")
    (folder / "student.txt").write_text("User: {problem} Assistant:")
    (folder / "teacher.txt").write_text("Teacher: <question>")
    problems = single_products(soar.make_world(0))
    (folder / "problems.jsonl").write_text(
        "".join(json.dumps(vars(problem)) + "\n" for problem in problems)
    )
    return [
        "--dataset",
        f"{folder}/problems.jsonl",
        "--student-prompt",
        f"{folder}/student.txt",
        "--model",
        base,
        "--teacher-prompt",
        f"{folder}/teacher.txt",
        "--cache",
        str(cache),
        *(
            "--preset smoke --processes 1 --device cpu --steps 6 --n 4 --repeats 2 --inner-steps 3 --inner-extra 1 "
            "--seed 1 --student-batch 4 --student-group 8 --fail-k 2 --pool 24 --reward-questions 8 --eval-samples 4 --tau -0.9 --window 2 "
            "--student-tokens 24 --teacher-tokens 40 --student-lr 1e-2 --teacher-lr 1e-3 "
            "--sample-tokens 4096 "
            "--micro-tokens 150"
        ).split(),
    ]


@pytest.fixture(scope="session")
def finished(toy, tmp_path_factory):
    """The folder of a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    assert soar.main([*toy, "--out", str(folder)]) == 0
    return folder


def log_rows(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def outcome(folder) -> dict:
    """All that a run leaves behind, but for what it cost."""
    files = [
        "questions.jsonl",
        "promotion_questions.jsonl",
        "report.json",
        "student/model.safetensors",
        "teacher/model.safetensors",
    ]
    left = {name: (folder / name).read_bytes() for name in files}
    return left | {
        "log": [
            {name: value for name, value in row.items() if name != "cost"}
            for row in log_rows(folder)
        ]
    }


def copy_of(folder: Path, target: Path) -> Path:
    shutil.copytree(folder, target)
    config = json.loads((target / "config.json").read_text()) | {"out": str(target)}
    (target / "config.json").write_text(json.dumps(config))
    return target


def test_what_a_run_leaves(finished, capsys):
    """Figures that are missing, not finite, or of the wrong count in the files that a plot would be made from."""
    rows, config = log_rows(finished), json.loads((finished / "config.json").read_text())
    assert [row["step"] for row in rows] == list(range(6)) and config["steps"] == 6
    assert [bool(row["promotion"]) for row in rows] == [False, True] * 3
    assert any(reward for row in rows for rewards in row["rewards"] for reward in rewards)
    assert (
        sum(row["teacher"]["grad_norm"] > 0 for row in rows) >= 2
    )  # or resuming would not test the teacher's moments
    for row in rows:
        assert [len(x) for x in (*row["rewards"], *row["errors"])] == [2, 2, 2, 2]
        assert row["reward"] == pytest.approx(sum(map(sum, row["rewards"])) / 4)
        assert {"acceptance", "truncated", "length", "grad_norm", "kl"} <= set(row["teacher"])
        assert {"success", "flat_groups", "truncated", "length", "grad_norm", "kl"} <= set(
            row["student"]
        )
        assert {"seconds", "tokens_per_second", "peak_memory_gb"} == set(row["cost"])
        for figures in (row["teacher"], row["student"], row["cost"]["tokens_per_second"]):
            assert all(math.isfinite(value) for value in figures.values())
    questions = [
        json.loads(line) for line in (finished / "questions.jsonl").read_text().splitlines()
    ]
    assert len(questions) == 6 * 2 * 4
    for q in questions:
        assert q["reward"] == pytest.approx(sum(rows[q["step"]]["rewards"][q["dataset"]]) / 2)
    promoted = [(row["step"], row["promotion"]["dataset"]) for row in rows if row["promotion"]]
    expected = [
        {"question": q["question"], "answer": q["answer"]}
        for q in questions
        if (q["step"], q["dataset"]) in promoted
    ]
    assert [
        json.loads(line)
        for line in (finished / "promotion_questions.jsonl").read_text().splitlines()
    ] == expected
    assert not list(finished.rglob("*.tmp"))


def test_same_seed_same_log(toy, finished, tmp_path):
    """A random number that does not come from the seed; or a seed that reaches nothing."""
    assert soar.main([*toy, "--out", str(tmp_path / "again")]) == 0
    assert outcome(tmp_path / "again") == outcome(finished)
    assert soar.main([*toy, "--out", str(tmp_path / "other"), "--seed", "2"]) == 0
    assert outcome(tmp_path / "other")["log"] != outcome(finished)["log"]


def wait_for_lines(process, file: Path, count: int) -> None:
    while process.poll() is None and (not file.exists() or file.read_text().count("\n") < count):
        time.sleep(0.01)


def test_resume_after_sigkill(toy, finished, tmp_path):
    """Killed at once after a line of the log appeared, and again in the middle of a step: the resumed run must come to
    the same numbers and the same weights, to the bit."""
    out = tmp_path / "killed"
    command = [sys.executable, str(ROOT / "soar.py"), *toy, "--out", str(out)]
    for lines, seconds, resume in ((2, 0.0, []), (4, 0.2, ["--resume"])):
        process = subprocess.Popen(
            command + resume, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        wait_for_lines(process, out / "log.jsonl", lines)
        time.sleep(seconds)
        process.kill()
        assert process.wait() == -signal.SIGKILL, "the run was over before it could be killed"
        assert 2 <= len((out / "log.jsonl").read_text().splitlines()) < 6
    assert soar.main([*toy, "--out", str(out), "--resume"]) == 0
    assert outcome(out) == outcome(finished)


@pytest.mark.parametrize(
    "function, call",
    [
        ("save_checkpoint", 4),
        ("write_atomically", 7),
        ("save_model", 2),
        ("policy_update", 40),
        ("report", 1),
    ],
)
def test_resume_after_ctrl_c(function, call, toy, finished, tmp_path, monkeypatch, capsys):
    """A stop between any two writes of a step: a step logged but not saved, a promotion half done."""
    out, calls, real = tmp_path / "stopped", [], getattr(soar, function)
    signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # a background job of a shell starts with it ignored

    def stop(*args):
        calls.append(1)
        if len(calls) == call:
            signal.raise_signal(signal.SIGINT)
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(soar, function, stop)
        assert soar.main([*toy, "--out", str(out)]) == 130
    error = capsys.readouterr().err.strip()
    assert (
        error.startswith("soar: ")
        and "\n" not in error
        and "--resume" in error
        and str(out) in error
    )
    assert soar.main([*toy, "--out", str(out), "--resume"]) == 0
    assert outcome(out) == outcome(finished)


def torchrun(script: Path, *argv):
    """Two processes on this machine, with gloo. Without the -- torchrun would take --n for one of its own flags."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        "--",
        str(script),
        *argv,
    ]
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )


def run_soar(*argv) -> subprocess.Popen:
    """soar.py in a process group of its own, as a shell starts it."""
    return subprocess.Popen(
        [sys.executable, str(ROOT / "soar.py"), *argv],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


@pytest.mark.parametrize("start", ["2 processes", "3 processes", "torchrun"])
def test_any_number_of_processes_comes_to_the_same(start, toy, finished, tmp_path):
    """A student that depends on who trained others before it, results in another order, a file that both write, a teacher
    that each process updates on its own."""
    argv = [*toy, "--out", str(tmp_path / "many"), "--cache", str(tmp_path / "cache")]
    if start == "torchrun":
        done = torchrun(ROOT / "soar.py", *argv)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("PROMOTION") == 3  # process 0 alone speaks
    else:
        with run_soar(*argv, "--processes", start[0]) as process:
            out, error = process.communicate(timeout=300)
        assert process.returncode == 0 and not error and out.count("PROMOTION") == 3, error
    assert outcome(tmp_path / "many") == outcome(finished)
    assert not list(tmp_path.rglob("*.tmp"))


def test_jobs_are_shared():
    """A process that does nothing, or all that the others do once more: the same numbers, and no faster."""

    class Worker:
        """Does its jobs at once, and remembers them."""

        def send(self, message):
            _, task, common, self.jobs = message
            self.results = [task(None, *common, *job) for job in self.jobs]

        def recv(self):
            return self.results.pop(0)

    here, crew = [], [Worker(), Worker()]
    policy = argparse.Namespace(workers=crew, source=None)

    def task(model, base, number):
        if model is policy:
            here.append(number)
        return base + number

    assert list(soar.share(policy, task, (100,), [(i,) for i in range(8)])) == [
        100 + i for i in range(8)
    ]
    assert here == [0, 3, 6]
    assert [worker.jobs for worker in crew] == [[(1,), (4,), (7,)], [(2,), (5,)]]


def test_another_process_fails(toy, tmp_path):
    """What goes wrong in another process is said once, in one sentence, by process 0; which must not wait for ever."""
    (tmp_path / "broken.py").write_text(
        "import os, sys\nimport soar\n"
        "def train_student(*_):\n    raise soar.UserError('the disk of process 1 is full')\n"
        "if __name__ == '__mp_main__' or os.environ.get('RANK') == '1':\n    soar.train_student = train_student\n"
        "if __name__ == '__main__':\n    sys.exit(soar.main(sys.argv[1:]))\n"
    )
    argv = [*toy, "--out", str(tmp_path / "out"), "--processes", "2"]
    done = subprocess.run(
        [sys.executable, str(tmp_path / "broken.py"), *argv],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert (done.returncode, done.stderr) == (2, "soar: the disk of process 1 is full\n")
    done = torchrun(tmp_path / "broken.py", *argv[:-4], "--out", str(tmp_path / "other"))
    assert done.returncode != 0 and "soar: the disk of process 1 is full" in done.stderr
    assert not list(tmp_path.rglob("log.jsonl"))


def children(process: subprocess.Popen) -> list[int]:
    """Python processes that this one has started for its jobs."""
    found = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [int(pid) for pid in found if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def is_running(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def wait_until(condition, seconds: float = 30.0) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    return condition()


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="looks for processes in /proc")
@pytest.mark.parametrize("victim", ["process 0", "process 1", "Ctrl-C"])
def test_processes_end_together(victim, toy, finished, tmp_path):
    """Killed without warning: no orphan goes on, nobody waits for the dead; Ctrl-C: one sentence for all of them."""
    out = tmp_path / "run"
    argv = [*toy, "--out", str(out), "--processes", "2"]
    with run_soar(*argv) as process:
        wait_for_lines(process, out / "log.jsonl", 2)
        (other,) = children(process)
        if victim == "Ctrl-C":
            os.killpg(process.pid, signal.SIGINT)  # as the terminal does: all of them get it
        else:
            os.kill(process.pid if victim == "process 0" else other, signal.SIGKILL)
        error = process.communicate(timeout=60)[1]
    assert wait_until(lambda: not is_running(other))
    expected = {
        "process 0": (-signal.SIGKILL, ""),
        "process 1": (2, "died"),
        "Ctrl-C": (130, "interrupted"),
    }[victim]
    assert process.returncode == expected[0] and expected[1] in error
    assert error.count("\n") == (victim != "process 0"), error
    assert soar.main([*toy, "--out", str(out), "--resume"]) == 0
    assert outcome(out) == outcome(finished)


def test_how_many_processes(policy, monkeypatch):
    """More than there is work, cores or memory for; or cards of somebody else."""
    config = small_config()
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(8), raising=False)
    monkeypatch.setattr(soar, "free_memory", lambda: 64e9)
    assert PROCESS_COUNT(policy, config, 16) == 8
    assert PROCESS_COUNT(policy, config, 3) == 3
    assert PROCESS_COUNT(policy, dataclasses.replace(config, processes=5), 3) == 5
    monkeypatch.setattr(soar, "free_memory", lambda: 3e9)
    assert PROCESS_COUNT(policy, config, 16) == 2
    monkeypatch.setattr(soar, "free_memory", lambda: 1e6)
    assert PROCESS_COUNT(policy, config, 16) == 1
    policy.model = argparse.Namespace(device=torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert PROCESS_COUNT(policy, config, 16) == 1
    assert PROCESS_COUNT(policy, dataclasses.replace(config, processes=5), 16) == 5


def test_the_tiny_world_stays_on_the_cpu(monkeypatch):
    """A step of the first run took 38 s on an H200, and 11 s on two CPU cores."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    config = soar.parse_config([])
    assert soar.choose_device(config) == "cpu"
    assert soar.choose_device(dataclasses.replace(config, device="cuda")) == "cuda"
    assert soar.choose_device(dataclasses.replace(config, model="large", dataset="math")) == "cuda"


@pytest.mark.parametrize("device", ["auto", "cuda", "cuda:1"])
def test_workers_go_round_the_cards(device, monkeypatch):
    """A third process on two cards asked for the card cuda:2; and a card that was chosen is kept."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    loaded = []

    def load(path, config, meter):
        loaded.append(config.device)
        return argparse.Namespace()

    monkeypatch.setattr(soar, "load_policy", load)
    config = dataclasses.replace(small_config(), model="large", device=device)
    for number in (1, 2, 3):
        soar.load_copy(("model", config), number)
    assert loaded == (["cuda:1"] * 3 if device == "cuda:1" else ["cuda:1", "cuda:0", "cuda:1"])
    soar.load_copy(("tiny", dataclasses.replace(config, model="tiny", device="auto")), 1)
    assert loaded[-1] == "auto"  # a CPU, as for process 0


def test_resume_of_a_finished_run(toy, finished, tmp_path, capsys):
    """It must print its table again, and train nothing more."""
    out = copy_of(finished, tmp_path / "copy")
    capsys.readouterr()
    assert soar.main([*toy, "--out", str(out), "--resume"]) == 0
    printed = capsys.readouterr().out
    assert (
        "promoted student" in printed
        and "held-out hard problems" in printed
        and "step   " not in printed
    )
    before, after = contents(finished), contents(out)
    assert [p.relative_to(finished) for p in before] == [p.relative_to(out) for p in after]
    changed = {old.name for old, new in zip(before, after) if before[old] != after[new]}
    assert changed <= {"config.json"}  # which holds the folder's own name


def test_other_speed_flags_on_resume(toy, finished, tmp_path):
    """After an out-of-memory error the run must go on with smaller micro-batches, as its message says."""
    out = copy_of(finished, tmp_path / "copy")
    assert soar.main([*toy, "--out", str(out), "--resume", "--micro-tokens", "500"]) == 0


def test_no_promotion_and_learnability(toy, tmp_path, capsys):
    """The two switches must run to the end and leave the student at the base model."""
    for i, more in enumerate((["--no-promotion"], ["--reward", "learnability"])):
        out = tmp_path / str(i)
        assert soar.main([*toy, "--out", str(out), "--steps", "2", "--window", "1", *more]) == 0
        printed = capsys.readouterr().out
        assert "No student was promoted" in printed and "nobody can be promoted" in printed
        assert ("students train on each" in printed) == (i == 0) and (
            "does not train" in printed
        ) == (i == 1)
        assert (
            not (out / "student").exists()
            and json.loads((out / "report.json").read_text())["promotions"] == 0
        )
        assert [row["promotion"] for row in log_rows(out)] == [None, None]


# --- Bad input


def test_run_folder_in_the_way(toy, finished, tmp_path, capsys):
    """Nothing that took hours may be written over, and no run may go on with other flags than it was started with."""
    run, foreign = copy_of(finished, tmp_path / "run"), tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("years of work")
    before = contents(tmp_path)
    refused(capsys, [*toy, "--out", str(run)], "--resume", "--out")
    refused(
        capsys,
        [*toy, "--out", str(run), "--resume", "--student-group", "4", "--seed", "2"],
        "--student-group 8",
        "--seed 1",
    )
    for more in ([], ["--resume"]):
        refused(capsys, [*toy, "--out", str(foreign), *more], "foreign", "--out")
        refused(capsys, [*toy, "--out", str(foreign / "thesis.tex"), *more], "--out")
    assert contents(tmp_path) == before


@pytest.mark.parametrize("flag", ["--out", "--cache"])
def test_folder_that_cannot_be_made(flag, toy, tmp_path, capsys):
    """A folder under a file, a read-only disk: a sentence, and not after hours of filtering."""
    (tmp_path / "file").write_text("")
    refused(
        capsys,
        [*toy, "--out", str(tmp_path / "run"), flag, str(tmp_path / "file/sub")],
        str(tmp_path / "file"),
    )


@pytest.mark.parametrize("name", ["checkpoint.pt", "config.json"])
@pytest.mark.parametrize(
    "damage", [lambda data: data[: len(data) // 2], lambda data: b""], ids=["cut", "empty"]
)
def test_damaged_run(name, damage, toy, finished, tmp_path, capsys):
    """A file that the disk has damaged must be named, and the rest of the folder left for its owner to mend."""
    run = copy_of(finished, tmp_path / "run")
    (run / name).write_bytes(damage((run / name).read_bytes()))
    before = contents(run)
    refused(capsys, [*toy, "--out", str(run), "--resume"], name)
    assert contents(run) == before


def test_bad_models(toy, base, tmp_path, capsys):
    """No such folder, no such model on the hub, half a download, a device that is not there, damaged weights."""
    out = tmp_path / "run"
    refused(capsys, [*toy, "--out", str(out), "--model", str(tmp_path / "nowhere")], "nowhere")
    refused(
        capsys,
        [*toy, "--out", str(out), "--model", "nobody/no-such-model"],
        "nobody/no-such-model",
        "network",
    )
    refused(capsys, [*toy, "--out", str(out), "--device", "abacus"], "--device abacus")
    half = shutil.copytree(base, tmp_path / "half")
    (half / "model.safetensors").write_bytes((half / "model.safetensors").read_bytes()[:5000])
    refused(capsys, [*toy, "--out", str(out), "--model", str(half)], "half")
    model, tokenizer = soar.load_model(base, small_config())
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 3] = math.nan
    model.save_pretrained(tmp_path / "nan")
    tokenizer.save_pretrained(tmp_path / "nan")
    refused(capsys, [*toy, "--out", str(out), "--model", str(tmp_path / "nan")], "NaN")
    assert nothing_done(out)


@pytest.mark.parametrize("dataset", ["math", "harp", "olympiad"])
def test_no_network(dataset, toy, tmp_path, capsys):
    """The hub's libraries raise dozens of kinds of error, many lines long."""
    pytest.importorskip("datasets")
    refused(
        capsys,
        [*toy, "--out", str(tmp_path / "run"), "--cache", str(tmp_path), "--dataset", dataset],
        dataset,
        "network",
    )
    assert nothing_done(tmp_path / "run")


def test_bad_prompts_and_problems(toy, tmp_path, capsys):
    """Missing files, a student prompt without a place for the problem, prompts that do not fit the model's context."""
    out, file = tmp_path / "run", tmp_path / "file.txt"
    argv = [*toy, "--out", str(out)]
    refused(capsys, [*argv, "--teacher-prompt", str(file)], "file.txt")
    file.write_text("Solve this:")
    refused(capsys, [*argv, "--student-prompt", str(file)], "file.txt", "{problem}")
    file.write_text(" \n")
    refused(capsys, [*argv, "--teacher-prompt", str(file)], "file.txt")
    file.write_bytes(b"caf\xe9 {problem}")
    refused(capsys, [*argv, "--student-prompt", str(file)], "file.txt")
    file.write_text("Teacher: " * 100)
    refused(capsys, [*argv, "--teacher-prompt", str(file)], "teacher", "128")
    refused(capsys, [*argv, "--student-tokens", "120"], "--student-tokens", "128")
    file.write_text(
        '{"problem": "4*5", "answer": "20"}\n{"problem": "%s", "answer": "20"}\n' % ("4*5 " * 110)
    )
    refused(capsys, [*argv, "--dataset", str(file)], "begins '4*5 4*5", "128")
    file.write_text('{"problem": "4*5", "answer": "20"}\nproblem,answer\n')
    refused(capsys, [*argv, "--dataset", str(file)], "file.txt", "line 2")
    refused(capsys, [*argv, "--dataset", str(tmp_path / "no.jsonl")], "no.jsonl")
    assert nothing_done(out)


def test_empty_hard_set(toy, tmp_path, monkeypatch, capsys):
    """A model that solves everything leaves nothing to split; a single problem neither."""
    out = tmp_path / "run"
    file = tmp_path / "one.jsonl"
    file.write_text('{"problem": "a= 4*5", "answer": "never"}\n')
    refused(capsys, [*toy, "--out", str(out), "--dataset", str(file)], "1 problem(s)", "--pool")
    monkeypatch.setattr(soar, "student_reward", lambda *_: RIGHT)
    refused(
        capsys,
        [*toy, "--out", str(out), "--cache", str(tmp_path / "cache")],
        "0 problem(s)",
        "--pool",
    )
    assert nothing_done(out)


@pytest.mark.parametrize(
    "error",
    [
        AssertionError("Torch not compiled with CUDA enabled"),
        RuntimeError("The NVIDIA driver on your system is too old (found version 11040).\nMore."),
    ],
)
def test_the_plan_says_why_there_is_no_gpu(error, policy, monkeypatch, capsys):
    """A driver older than torch's CUDA looks like no GPU: an afternoon on the CPU, unnoticed."""

    def init():
        raise error

    monkeypatch.setattr(torch.cuda, "init", init)
    soar.print_plan([], policy, small_config(dataset="problems.jsonl"))
    assert f"float32 on cpu (no GPU: {str(error).splitlines()[0]})" in capsys.readouterr().out
    soar.print_plan([], policy, small_config())  # the tiny world wants none
    assert "float32 on cpu," in capsys.readouterr().out
    soar.print_plan([], policy, small_config(dataset="problems.jsonl", device="cpu"))
    assert "float32 on cpu," in capsys.readouterr().out


@pytest.mark.parametrize("reward", ["grounded", "learnability"])
def test_every_column_is_explained(reward, finished, capsys):
    """A column of a step's line that the plan does not know, or calls by another name."""
    soar.print_columns(small_config(reward=reward))
    explained = re.findall(r"^  (\w+(?: \w+)*)  ", capsys.readouterr().out, re.MULTILINE)
    soar.print_step(log_rows(finished)[0], soar.Meter())
    line = capsys.readouterr().out
    assert re.findall(r"  ([a-z ]+?) [ +-]*[\d.]+", line) == explained and len(explained) == 5


def test_choose_dtype(monkeypatch):
    """bfloat16 on a T4, which emulates it at a quarter of the speed."""
    assert soar.choose_dtype("cpu") == torch.float32
    capability = None
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    bfloat16 = torch.bfloat16
    for capability, dtype in (((7, 5), torch.float32), ((8, 0), bfloat16), ((12, 0), bfloat16)):
        assert soar.choose_dtype("cuda") == soar.choose_dtype("cuda:1") == dtype


def no_memory(*_):
    raise MemoryError


def no_gpu_memory(*_):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def no_cpu_memory(*_):
    torch.empty(2**55)  # PyTorch's own words for it on a CPU, which is a plain RuntimeError


@pytest.mark.parametrize("fail", [no_memory, no_gpu_memory, no_cpu_memory])
@pytest.mark.parametrize(
    "function, flag", [("generate", "--sample-tokens"), ("completion_logprobs", "--micro-tokens")]
)
def test_out_of_memory(function, flag, fail, toy, tmp_path, monkeypatch, capsys):
    """The message must name the flag that lowers the memory of what was going on."""
    monkeypatch.setattr(soar, function, fail)
    argv = [*toy, "--out", str(tmp_path / "run"), "--cache", str(tmp_path / "cache")]
    refused(capsys, argv, "memory", flag, "--resume")


@pytest.mark.parametrize(
    "error, memory",
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"), True),
        (torch.AcceleratorError("CUDA error: out of memory"), True),
        (torch.AcceleratorError("CUDA error: device-side assert triggered"), False),
        (torch.AcceleratorError("CUDA error: no kernel image is available"), False),
        (torch.distributed.DistBackendError("NCCL error: unhandled system error"), False),
        (NotImplementedError("no such operator"), False),
    ],
)
def test_only_memory_is_called_out_of_memory(error, memory, capsys):
    """Advice to lower --micro-tokens after a failed assertion on the GPU: a day is lost."""

    def work():
        raise error

    if memory:
        assert soar.exit_code("soar", work, soar.Meter(), ["python"]) == 2
        assert "out of memory" in capsys.readouterr().err
    else:
        with pytest.raises(type(error)):
            soar.exit_code("soar", work, soar.Meter(), ["python"])


def test_nan_in_mid_run(toy, finished, tmp_path, capsys, monkeypatch):
    """A learning rate that blows up the students must not reach the log or the checkpoint."""
    out = tmp_path / "run"
    rewards = itertools.count()  # all different, so that the first step already moves the student
    monkeypatch.setattr(soar, "student_reward", lambda *_: -next(rewards))
    refused(capsys, [*toy, "--out", str(out), "--student-lr", "1e39"], "NaN")
    assert not (out / "log.jsonl").exists() and not (out / "checkpoint.pt").exists()


def nothing_done(out: Path) -> bool:
    """The folder is not there, or holds no more than the lock: the same command can be given again."""
    return not out.exists() or [file.name for file in out.iterdir()] in ([], [soar.LOCK])


def test_one_folder_one_run(toy, tmp_path, capsys):
    """Two runs in one folder both ended well, with files that were a mixture. A killed run must leave no lock behind."""
    out = tmp_path / "run"
    argv = [*toy, "--out", str(out), "--steps", "8"]
    with subprocess.Popen(
        [sys.executable, str(ROOT / "soar.py"), *argv], stdout=subprocess.DEVNULL
    ) as first:
        wait_for_lines(first, out / "log.jsonl", 1)
        refused(capsys, [*argv, "--resume"], str(out), "another process")
        first.kill()
    rows = len(log_rows(out))
    with soar.claim(out):
        pass
    assert soar.main([*argv, "--resume"]) == 0
    assert len(log_rows(out)) == 8 > rows


def test_one_folder_one_evaluation(finished, tmp_path, capsys):
    """Two evaluations of one run at once, too, even where their tables go to different folders."""
    run = copy_of(finished, tmp_path / "run")
    with soar.claim(run):
        capsys.readouterr()
        assert eval_.main([str(run), "--methods", "base", "--out", str(tmp_path / "table")]) == 2
        assert "another process" in capsys.readouterr().err
    assert (
        eval_.main([str(run), "--methods", "base", "--out", str(run)]) == 0
    )  # its own lock is none


def test_two_runs_share_a_cache(tmp_path):
    """Two processes that pretrain and filter at once wrote into each other's temporary files."""
    argv = [
        "--cache",
        str(tmp_path / "cache"),
        "--steps",
        "1",
        "--pool",
        "40",
        "--fail-k",
        "4",
        "--n",
        "2",
        "--teacher-group",
        "2",
        "--repeats",
        "1",
        "--inner-steps",
        "1",
        "--student-batch",
        "2",
        "--student-group",
        "2",
        "--eval-samples",
        "1",
        "--processes",
        "1",
    ]
    code = "import sys, soar; soar.PRETRAIN['steps'] = 30; sys.exit(soar.main(sys.argv[1:]))"
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", code, *argv, "--out", str(tmp_path / name)],
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for name in "ab"
    ]
    assert [(run.communicate()[1], run.returncode) for run in runs] == [("", 0)] * 2
    assert outcome_of_students(tmp_path / "a") == outcome_of_students(tmp_path / "b")
    assert not list((tmp_path / "cache").glob("*.tmp"))


def outcome_of_students(folder: Path) -> list:
    return [(row["rewards"], row["student"]) for row in log_rows(folder)]


@pytest.mark.parametrize("what", ["problem", "prompt", "model"])
def test_resume_with_changed_inputs(what, toy, base, finished, tmp_path, capsys):
    """A file that changed between a run and its --resume went on with another split, prompt or base model, silently."""
    run, argv = copy_of(finished, tmp_path / "run"), dict(zip(toy[::2], toy[1::2]))
    before = contents(run)
    flag = {"problem": "--dataset", "prompt": "--teacher-prompt", "model": "--model"}[what]
    original, changed = Path(argv[flag]), tmp_path / "changed"
    if what == "model":
        model, tokenizer = soar.load_model(base, small_config())
        with torch.no_grad():
            model.lm_head.weight[5, 5] += 1e-3
        model.save_pretrained(changed)
        tokenizer.save_pretrained(changed)
    else:
        text = original.read_text()
        changed.write_text(
            text.replace('4*5"', '5*4"', 1) if what == "problem" else "Teacher: Teacher: <question>"
        )
        assert changed.read_text() != text
    config = json.loads(
        (run / "config.json").read_text()
    )  # the path is the same, what stands there is not
    name = flag[2:].replace("-", "_")
    (run / "config.json").write_text(json.dumps(config | {name: str(changed)}))
    refused(
        capsys,
        [*toy, flag, str(changed), "--steps", "6", "--out", str(run), "--resume"],
        str(run),
        "changed",
    )
    after = contents(run)
    assert {path: after[path] for path in before if path.name != "config.json"} == {
        path: data for path, data in before.items() if path.name != "config.json"
    }


def test_eval_with_changed_problems(toy, finished, tmp_path, capsys):
    """eval.py split the changed file anew: what the students trained on could be among the tests."""
    run, config = (
        copy_of(finished, tmp_path / "run"),
        json.loads((finished / "config.json").read_text()),
    )
    changed = tmp_path / "problems.jsonl"
    lines = Path(config["dataset"]).read_text().splitlines(keepends=True)
    changed.write_text("".join(lines[:3] + lines[4:]))
    (run / "config.json").write_text(json.dumps(config | {"dataset": str(changed)}))
    capsys.readouterr()
    assert eval_.main([str(run), "--methods", "base"]) == 2
    assert "no longer those of the run" in capsys.readouterr().err


def disk_full(*_, **__):
    raise OSError(28, "No space left on device")


def torch_disk_full(*_, **__):
    raise RuntimeError(
        "[enforce fail at inline_container.cc:668] PytorchStreamWriter failed writing file data/0: file write failed"
    )


@pytest.mark.parametrize(
    "owner, name, fail",
    [
        (torch, "save", disk_full),
        (torch, "save", torch_disk_full),
        (Path, "write_text", disk_full),
        (transformers.PreTrainedModel, "save_pretrained", torch_disk_full),
    ],
)
def test_disk_full_in_mid_run(owner, name, fail, toy, finished, tmp_path, capsys, monkeypatch):
    """A full disk in the middle of a run: one sentence, nothing lost, and --resume comes to the same numbers."""
    out, real, calls = tmp_path / "run", getattr(owner, name), itertools.count()
    late = {"save": 2, "write_text": 9, "save_pretrained": 1}[name]
    monkeypatch.setattr(
        owner, name, lambda *a, **k: (real if next(calls) < late else fail)(*a, **k)
    )
    refused(capsys, [*toy, "--out", str(out)], "cannot write", "--resume")
    assert not list(out.glob("*.json*.tmp"))
    monkeypatch.undo()
    assert soar.main([*toy, "--out", str(out), "--resume"]) == 0
    assert outcome(out) == outcome(finished)


def test_flipped_bit_in_the_checkpoint(toy, finished, tmp_path, capsys):
    """torch.load reads a damaged weight as another number, and the run goes on from it."""
    run = copy_of(finished, tmp_path / "run")
    data = bytearray((run / "checkpoint.pt").read_bytes())
    weight = json.loads(
        json.dumps(list(torch.load(run / "checkpoint.pt")["teacher"][0][5][:4].numpy().tobytes()))
    )
    place = data.find(bytes(weight))
    assert place > 0
    data[place + 1] ^= 64
    (run / "checkpoint.pt").write_bytes(data)
    torch.load(run / "checkpoint.pt")  # which notices nothing
    refused(capsys, [*toy, "--out", str(run), "--resume"], "checkpoint.pt", "damaged")


def test_lost_checkpoint(toy, finished, tmp_path, capsys):
    """A run without its checkpoint began anew without a word, and wrote over its log."""
    run = copy_of(finished, tmp_path / "run")
    (run / "checkpoint.pt").unlink()
    before = contents(run)
    refused(capsys, [*toy, "--out", str(run), "--resume"], "checkpoint.pt")
    assert contents(run) == before
    folder = tmp_path / "new"
    assert soar.main([*toy, "--out", str(folder), "--resume", "--steps", "1"]) == 0
    assert "begins at its beginning" in capsys.readouterr().out


@pytest.mark.parametrize(
    "text",
    [
        '{"done": 32, "hard": [0, 0, 1, 1]}',
        '{"done": 32, "hard": [99]}',
        '{"hard": [1, 0], "done": 32}',
        "[]",
        '{"done": 2}',
    ],
)
def test_filter_cache_that_cannot_be(text, policy, tmp_path):
    """The same problem twice, one that is not there: it could be in train and in test."""
    pool, config = (
        single_products(soar.make_world(0))[:4],
        small_config(fail_k=1, cache=str(tmp_path)),
    )
    soar.hard_problems(policy, pool, config)
    (path,) = tmp_path.iterdir()
    path.write_text(text)
    with pytest.raises(UserError, match="damaged"):
        soar.hard_problems(policy, pool, config)


def test_nobody_reads_the_output(toy, tmp_path):
    """`soar.py | head` ended in a traceback."""
    argv = [sys.executable, str(ROOT / "soar.py"), *toy, "--out", str(tmp_path / "run")]
    with subprocess.Popen(
        argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        process.stdout.readline()
        process.stdout.close()
        error = process.stderr.read()
    assert process.returncode == 2 and "--resume" in error and error.count("\n") == 1, error


def test_disk_too_small(toy, tmp_path, capsys, monkeypatch):
    """The checkpoints of a 3B model need 72 GB: a disk that cannot hold them must be known before the filter starts."""
    free = shutil.disk_usage(tmp_path)._replace(free=1_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    monkeypatch.setattr(soar, "hard_problems", lambda *_: pytest.fail("the filter has started"))
    refused(capsys, [*toy, "--out", str(tmp_path / "run")], "GB", "free")
    assert nothing_done(tmp_path / "run")


def test_console_without_letters(finished, tmp_path):
    """A console in ASCII or cp1252 ended a run at the first root sign, and every evaluation at its plus-minus sign."""
    run = copy_of(finished, tmp_path / "run")
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    done = subprocess.run(
        [
            sys.executable,
            str(ROOT / "eval.py"),
            str(run),
            "--methods",
            "hard-only",
            "--seeds",
            "2",
            "--steps",
            "1",
        ],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "?" in done.stdout, done.stderr
    assert "±" in (run / "eval.md").read_text(encoding="utf-8")


def test_left_over_ranks():
    """RANK and WORLD_SIZE of some other program made a single process wait for others that never came."""
    environment = {k: v for k, v in os.environ.items() if k != "TORCHELASTIC_RUN_ID"} | {
        "RANK": "1",
        "WORLD_SIZE": "2",
    }
    done = subprocess.run(
        [sys.executable, "-c", "import soar; print(soar.RANK, soar.TORCHRUN)"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.stdout == "0 False\n"


def test_time_left(monkeypatch, capsys):
    """The rest of the work at the speed so far, not at that of the plan; said once, and only where
    it is long."""
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    meter = soar.Meter()
    meter.expect(50, "the filter")
    assert meter.left() == 0  # nothing known yet
    now[0] += 60
    meter.advance(2)
    assert (
        meter.left() == 60 / 2 * 48
        and capsys.readouterr().out == "(the filter: about 24 min at this speed)\n"
    )
    now[0] += 60
    meter.advance(48)
    assert meter.left() == 0 and capsys.readouterr().out == ""
    meter.expect(2, "something short")
    now[0] += 10
    meter.advance()
    assert capsys.readouterr().out == ""
    # Four processes finish at the same time, and are counted one by one:
    meter.expect(8, "the students", together=4)
    now[0] += 60
    for _ in range(4):
        meter.advance()
    # A minute is left; with one of them counted it would have been seven.
    assert capsys.readouterr().out == ""
    # The first piece also held the start of a process: nine minutes were told of a run of two.
    meter.expect(240, "all outer steps")
    for seconds in (5, 1):
        now[0] += seconds
        meter.advance()
        assert capsys.readouterr().out == ""
    now[0] += 60
    meter.advance(48)
    assert capsys.readouterr().out == "(all outer steps: about 4 min at this speed)\n"


# ==================================================================================================
# Every architecture is right or refused
# ==================================================================================================
# soar.py has its own sampler, and its own way from hidden states to log-probabilities. Both lean on
# what most models do; some cap their logits, keep a state beside keys and values, or number
# positions themselves. Such a model must come out right or be refused when it is loaded. The truth
# here is the model's own forward, one sequence at a time, without cache and without padding;
# nothing that soar.py computes goes into it.

VOCAB = len(soar.VOCABULARY)

# The sizes of a small model under all the names that configurations have for them; each takes those
# that it knows.
SIZES = {
    VOCAB: "vocab_size vocab_size_per_layer_input",
    0: "pad_token_id",
    64: """
        intermediate_size ffn_dim decoder_ffn_dim encoder_ffn_dim n_inner dff ffn_hidden_size
        dim_ff d_inner feed_forward_size intermediate_size_mlp dense_intermediate_size
        mamba_d_ssm max_position_embeddings n_positions n_ctx max_seq_len model_max_length
        context_length max_target_positions
    """,
    32: """
        hidden_size d_model n_embd embedding_size embedding_dim word_embed_proj_dim
        input_embedding_size emb_dim output_embedding_size attention_hidden_size lru_width
        backbone_hidden_size rnn_hidden_size
    """,
    16: """
        q_lora_rank kv_lora_rank qk_head_dim index_head_dim moe_intermediate_size
        shared_expert_intermediate_size moe_shared_expert_intermediate_size
        shared_intermediate_size expert_ffn_hidden_size image_size
        shared_experts_intermediate_size router_hidden_size
    """,
    8: """
        head_dim d_head dim_head kv_channels attention_head_dim attention_head_size
        global_head_dim swa_head_dim qk_nope_head_dim qk_rope_head_dim v_head_dim
        linear_key_head_dim linear_value_head_dim linear_head_dim mamba_d_head mamba_head_dim
        mamba_headdim mamba_n_heads mamba_num_heads dim_model_base patch_size state_size
        mamba_d_state ssm_state_size mamba_chunk_size chunk_size hidden_size_per_layer_input
        sliding_window window_size attention_window_size local_attention attention_chunk_size
        sliding_window_size index_topk
    """,
    4: """
        num_attention_heads n_head n_heads decoder_attention_heads encoder_attention_heads
        num_heads rotary_dim num_decoder_attention_heads num_encoder_attention_heads
        swa_num_attention_heads linear_num_value_heads linear_num_heads num_local_experts
        num_experts n_routed_experts moe_num_experts mamba_d_conv time_step_rank mamba_dt_rank
        mm_tokens_per_image
    """,
    3: "num_channels",
    2: """
        num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers
        num_decoder_layers num_blocks num_encoder_layers num_key_value_heads num_kv_heads
        num_global_key_value_heads swa_num_key_value_heads index_n_heads num_experts_per_tok
        moe_k moe_topk linear_num_key_heads mamba_expand bos_token_id
    """,
    1: """
        eos_token_id n_group topk_group n_shared_experts first_k_dense_replace num_dense_layers
        mamba_n_groups n_groups n_mamba_heads mamba_ngroups
    """,
}
SMALL = {name: size for size, names in SIZES.items() for name in names.split()}
# What caps or scales logits, far enough from 1 to be seen.
SMALL |= dict.fromkeys(["final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap"], 3.0)
SMALL |= {"logits_scaling": 4.0, "logit_scale": 0.25, "lm_head_multiplier": 0.25}

# What these sizes get wrong. In latent attention there are as many key-value heads as query heads.
LATENT = """
    axk1 axk2 bailing_hybrid deepseek_v2 deepseek_v3 deepseek_v32 dots3_note_text
    glm4_moe_lite glm_moe_dsa kimi_linear longcat_flash minicpm3 youtu
""".split()
SPECIAL = dict.fromkeys(LATENT, {"num_key_value_heads": 4}) | {
    "mpt": dict(logit_scale=None),  # transformers' class does not read it
    "bamba": dict(attn_layer_indices=[1]),
    "gemma3n_text": dict(
        num_kv_shared_layers=2,
        activation_sparsity_pattern=None,
        num_hidden_layers=4,
        layer_types=["sliding_attention", "full_attention"] * 2,
    ),
    "gpt_neo": dict(attention_types=[[["global", "local"], 1]]),
    "jamba": dict(
        attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2, expert_layer_offset=1
    ),
    "lfm2": dict(layer_types=["conv", "full_attention"] * 2, num_hidden_layers=4),
    "lfm2_moe": dict(layer_types=["conv", "full_attention"] * 2, num_hidden_layers=4),
    "mamba2": dict(num_heads=8),
    "qwen4_exp_text": dict(
        indexer_n_heads=2,
        indexer_kv_heads=1,
        indexer_head_dim=8,
        indexer_budget=8,
        indexer_compress_ratio=2,
    ),
    "recurrent_gemma": dict(num_hidden_layers=3),
    "reformer": dict(
        is_decoder=True,
        attn_layers=["local", "lsh"],
        axial_pos_shape=[8, 8],
        axial_pos_embds_dim=[16, 16],
    ),
    "xmod": dict(default_language="en_XX"),
    "zamba": dict(
        num_hidden_layers=4,
        layers_block_type=["mamba", "hybrid"] * 2,
        attention_hidden_size=64,
        attention_head_dim=16,
        num_key_value_heads=4,
    ),
    "zamba2": dict(
        num_hidden_layers=4,
        layers_block_type=["linear_attention", "hybrid"] * 2,
        attention_hidden_size=64,
        attention_head_dim=16,
        num_key_value_heads=4,
        n_mamba_heads=8,
    ),
    "zaya": dict(num_experts_per_tok=1),
}

# A name's first word is the type; types that this transformers lacks are skipped. The first list
# was right before there was any check: a check that refuses one of them is wrong.
PLAIN = """
    llama qwen2 qwen2_moe qwen3 qwen3_moe gemma mistral ministral mixtral phi phi3 smollm3
    olmo olmo2 olmo3 olmoe gpt_neox gpt_neo gptj bloom falcon mpt stablelm starcoder2
    deepseek_v2 deepseek_v3 glm glm4 glm4_moe gpt_oss nemotron persimmon codegen ernie4_5
    hunyuan_v1_dense hunyuan_v1_moe exaone4 helium apertus arcee cwm flex_olmo dots1
    diffllama minimax_m2 bitnet
""".split()
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
}
VARIANTS = {
    "llama tied": dict(tie_word_embeddings=True),
    "llama biased": dict(attention_bias=True, mlp_bias=True),
    "llama yarn": dict(rope_parameters=YARN),
    "qwen2 window": dict(
        use_sliding_window=True, layer_types=["sliding_attention", "full_attention"]
    ),
    # most experts get no token, and no gradient
    "qwen3_moe many": dict(num_experts=64, num_experts_per_tok=1),
    "falcon alibi": dict(alibi=True),
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 4,
    "long_factor": [3.0] * 4,
    "factor": 4.0,
    "original_max_position_embeddings": 12,
    "partial_rotary_factor": 1.0,
}
TRAPS = {
    "logits are capped or scaled after the head": """
        gemma2 gemma3_text gemma3n_text gemma4_text vaultgemma nanochat cohere cohere2 granite
        granitemoe granitemoeshared minicpm3 hyperclovax inkling_text
    """,
    "layers between the hidden states and the head": "modernbert-decoder rembert",
    "dropout under any name, or other noise, in train mode": """
        gpt2 gpt_bigcode opt biogpt phimoe seed_oss xglm ctrl openai-gpt
    """,
    "a state beside keys and values": """
        mamba mamba2 falcon_mamba jamba bamba zamba2 lfm2 falcon_h1 recurrent_gemma rwkv
        qwen3_next qwen3_5_text granitemoehybrid nemotron_h minimax kimi_linear olmo_hybrid
        xlstm deepseek_v32 deepseek_v4
    """,
    "parameters without a gradient: images, what a balancing rule moves": """
        gemma3 gemma4 qwen3_5 fuyu phi4_multimodal ernie4_5_moe afmoe longcat_flash
    """,
    "positions of its own: wrong for the padded row of a batch alone": """
        bart marian mbart pegasus trocr cpmant
    """,
    "no causal mask: one pass over a sequence looks at later tokens": """
        bert roberta xlm-roberta xlnet prophetnet
    """,
    "its base model is the whole model": "llama4_text",
}
ARCHITECTURES = dict.fromkeys(PLAIN, {}) | VARIANTS
MUST_BE_SUPPORTED = list(ARCHITECTURES)
ARCHITECTURES |= {name: {} for names in TRAPS.values() for name in names.split()}
ARCHITECTURES["bert decoder"] = dict(is_decoder=True)
# Other frequencies for sequences of more than 12 tokens: what the cache holds was rotated by the
# first ones.
ARCHITECTURES["phi3 longrope"] = dict(rope_parameters=LONGROPE, original_max_position_embeddings=12)


def small_arguments(config: transformers.PretrainedConfig) -> dict:
    """What to change in a default configuration, and those nested in it, for a small model."""
    alias = getattr(config, "attribute_map", None) or {}
    computed = {
        name
        for name in dir(type(config))
        if isinstance(getattr(type(config), name, None), property)
    }
    known = {name for name in (*config.to_dict(), *alias) if alias.get(name, name) not in computed}
    arguments = {name: size for name, size in SMALL.items() if name in known}
    kinds = list(dict.fromkeys(getattr(config, "layer_types", None) or []))
    if kinds and "layer_types" in known:  # each kind of layer twice
        arguments |= {"layer_types": kinds * 2, "num_hidden_layers": 2 * len(kinds)}
    for name, value in vars(config).items():
        if isinstance(value, transformers.PretrainedConfig):
            arguments[name] = small_arguments(value)
    return arguments | SPECIAL.get(config.model_type, {})


def save_small(kind: str, folder: Path, overrides: dict) -> None:
    """A folder with a small random model of this type, and the tiny world's tokenizer.

    Matrices get a standard deviation of 0.25, whatever the type's own rule is, so that next-token
    distributions are far from uniform; vectors (norms, biases) move a little, so that one that is
    left out shows.
    """
    default = transformers.CONFIG_MAPPING[kind]()
    config = type(default)(**small_arguments(default) | overrides)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).float()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim < 2 or "A_log" in name:  # decays explode far from their first values
                p.add_(torch.randn_like(p) * 0.05)
            else:
                p.normal_(std=0.25)
    model.generation_config.eos_token_id = 1  # the tokenizer's
    model.save_pretrained(folder)
    soar.tiny_tokenizer().save_pretrained(folder)


PAIR = [[5, 60, 7, 130, 9, 30, 11], [20, 21, 22]]  # two prompts: the second is padded on the left
TOKENS = 12  # with these, prompt and completion exceed every window of 8
EARLY_ENDS = list(
    range(1, VOCAB, 8)
)  # so many EOS ids that the rows of a batch end at different times


def fixed_rollouts() -> list[Rollout]:
    """Completions that no model chose; the shorter one will be padded on the right."""
    luck = torch.Generator().manual_seed(7)
    rollouts = []
    for prompt, length in zip(PAIR, (TOKENS, 9)):
        completion = torch.randint(3, VOCAB, (length,), generator=luck).tolist()
        rollouts.append(Rollout(prompt, completion, "", False))
    return rollouts


# -- The truth. Each prefix has a forward of its own, since a model that looks at later tokens has
# no other next-token distribution than that of each prefix.


def next_logits(model, ids: list[int]) -> torch.Tensor:
    """[V]: of the token that follows ids."""
    return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].float()


@torch.no_grad()
def true_tokens(
    model, prompt: list[int], ends: list[int], temperature: float, uniforms=None
) -> tuple[list, list]:
    """(tokens, by how little each was chosen): greedy, or what the uniforms choose."""
    tokens, margins = [], []
    for t in range(TOKENS):
        logits = next_logits(model, prompt + tokens)
        if uniforms is None:
            first, second = logits.topk(2).values.tolist()
            margins.append(first - second)
            tokens.append(int(logits.argmax()))
        else:
            cdf = (logits.double() / temperature).softmax(-1).cumsum(-1)
            margins.append((cdf - uniforms[t]).abs().min().item())
            tokens.append(min(int((cdf <= uniforms[t]).sum()), VOCAB - 1))
        if tokens[-1] in ends:
            break
    return tokens, margins


def true_logprob(model, rollout: Rollout, temperature: float) -> torch.Tensor:
    """ln p(completion | prompt), a scalar."""
    total = torch.zeros(())
    for t, token in enumerate(rollout.completion):
        logits = next_logits(model, rollout.prompt + rollout.completion[:t])
        total = total + (logits / temperature).log_softmax(-1)[token]
    return total


def gradient_of(model, value: torch.Tensor) -> list[torch.Tensor]:
    """Of all parameters; where none arrives it is zero."""
    model.zero_grad()
    value.backward()
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()]


def oracle(folder: Path, temperature: float) -> dict:
    """What the sampler, the log-probabilities and their gradients must be."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    luck = torch.rand(4, TOKENS, generator=torch.Generator().manual_seed(3))
    logprobs = [true_logprob(model, rollout, temperature) for rollout in fixed_rollouts()]
    return {
        "luck": luck,
        "greedy": [true_tokens(model, prompt, [1], temperature) for prompt in PAIR],
        "sampled": [
            true_tokens(model, PAIR[i // 2], EARLY_ENDS, temperature, luck[i].tolist())
            for i in range(4)
        ],
        "logprobs": torch.stack(logprobs).detach(),
        "gradients": [gradient_of(model, logprob) for logprob in logprobs],
    }


# -- The judge.


def token_faults(what: str, truth: list, generated: tuple) -> list[str]:
    """Rows that differ from the truth, unless the choice at that place was too close to call."""
    wrong = 0
    for (expected, margins), row, length in zip(truth, *(x.tolist() for x in generated[:2])):
        got = row[:length]
        if got == expected:
            continue
        same = 0
        while same < min(len(got), len(expected)) and got[same] == expected[same]:
            same += 1
        wrong += same == len(margins) or margins[same] > 1e-4
    return [f"{what} tokens ({wrong} of {len(truth)} rows)"] if wrong else []


def length_of(gradient: list[torch.Tensor]) -> float:
    return torch.stack([g.norm() for g in gradient]).norm().item()


def logprob_faults(model, truth: dict, config: Config) -> list[str]:
    """Tolerances: 1e-3, and float32's own on sums of hundreds."""
    with torch.no_grad():
        logprobs = soar.completion_logprobs(model, fixed_rollouts(), config.temperature)
    error = (logprobs - truth["logprobs"]).abs().max().item()
    bound = 1e-3 + 1e-5 * truth["logprobs"].abs().max().item()
    return [] if error < bound else [f"log-probabilities by {error:.3g}"]


def update_faults(policy, truth: dict, config: Config) -> list[str]:
    """The first update, in whatever mode trains; the model is still its own reference."""
    found, gradient, step = [], [], soar.adamw_step

    def spy(model, *rest):
        gradient.extend(
            torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()
        )
        return step(model, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(soar, "adamw_step", spy)
        state, advantages = soar.adamw_state(policy.model), torch.tensor([1.0, -1.0])
        figures = soar.policy_update(policy, fixed_rollouts(), advantages, state, 1e-3, config)
    # loss = -(ln p_1 - ln p_2) / 2, and no KL yet
    expected = [(b - a) / 2 for a, b in zip(*truth["gradients"])]
    error = length_of([g - e for g, e in zip(gradient, expected, strict=True)]) / length_of(
        expected
    )
    if not error < 1e-3:
        found.append(f"the gradient by {error:.0%}")
    if not abs(figures["kl"]) < 1e-3:
        found.append(f"the KL of the model to itself is {figures['kl']:.3g}")
    return found


def faults(policy, truth: dict, config: Config) -> list[str]:
    """All in which sampler, log-probabilities and an update differ from the truth."""
    model, ends = policy.model, policy.model.generation_config.eos_token_id
    found = token_faults("greedy", truth["greedy"], soar.generate(model, PAIR, 1, TOKENS))
    model.generation_config.eos_token_id = EARLY_ENDS
    sampled = soar.generate(model, PAIR, 2, TOKENS, config.temperature, truth["luck"])
    model.generation_config.eos_token_id = ends
    found += token_faults("sampled", truth["sampled"], sampled)
    return found + logprob_faults(model, truth, config) + update_faults(policy, truth, config)


@torch.no_grad()
def saving_faults(policy, folder: Path) -> list[str]:
    """A promoted student's folder must hold the model that was trained."""
    soar.save_model(policy.model, policy.tokenizer, folder)
    again = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    error = (next_logits(again, PAIR[0]) - next_logits(policy.model, PAIR[0])).abs().max().item()
    return [] if error < 1e-3 else [f"logits of the saved model by {error:.3g}"]


def verdict_on(folder: Path, temperature: float = 0.7) -> tuple[str, str]:
    """(verdict, why): supported, refused or SILENTLY WRONG, without and with checkpointing."""
    truth, refusals = None, []
    for checkpointing in (False, True):
        config = small_config(checkpointing=checkpointing, temperature=temperature, kl=0.1)
        try:
            policy = soar.load_policy(str(folder), config, soar.Meter())
            truth = truth or oracle(folder, temperature)  # a refused model needs none
            found = faults(policy, truth, config) + saving_faults(policy, folder / "saved")
        except UserError as error:
            refusals.append(str(error))
            continue
        if found:
            return "SILENTLY WRONG", f"with checkpointing={checkpointing}: " + "; ".join(found)
    return ("refused", refusals[0]) if refusals else ("supported", "")


BROKEN_IN_5_0 = "apertus exaone4 granitemoehybrid jamba phi phi4_multimodal stablelm xlstm zamba2"


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_is_right_or_refused(name, tmp_path):
    """A model sampled from one distribution and trained as another; or a traceback."""
    kind = name.split()[0]
    broken = kind in BROKEN_IN_5_0.split() and transformers.__version__.startswith("5.0.")
    if broken or kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        pytest.skip(f"transformers {transformers.__version__} has no {kind} that loads")
    save_small(kind, tmp_path, ARCHITECTURES[name])
    verdict, why = verdict_on(tmp_path)
    allowed = ["supported"] if name in MUST_BE_SUPPORTED else ["supported", "refused"]
    assert verdict in allowed and "\n" not in why, why


# ==================================================================================================
# Every faulty folder is right or refused
# ==================================================================================================
# Each starts as a right one: a small Llama with the tiny world's tokenizer.


def edit_json(file: Path, **changes) -> None:
    """Values that are None remove their key."""
    content = json.loads(file.read_text()) if file.exists() else {}
    content |= changes
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def edit_weights(folder: Path, edit) -> None:
    """edit(name, tensor) -> {name: tensor}, of every weight."""
    file, new = folder / "model.safetensors", {}
    for name, tensor in load_file(file).items():
        new |= edit(name, tensor)
    save_file(new, file, metadata={"format": "pt"})


# Each of these returns, or is, a function that damages a folder.


def weights(edit):
    return lambda folder: edit_weights(folder, edit)


def without(part: str):
    return weights(lambda name, x: {} if part in name else {name: x})


def stored_as(dtype: torch.dtype):
    return weights(lambda name, x: {name: x.to(dtype)})


def as_integers(name: str, x: torch.Tensor) -> dict:
    """As quantised checkpoints are stored, with a scale that the model knows nothing of."""
    if "up_proj" not in name:
        return {name: x}
    return {name: (x * 100).round().to(torch.int8), name + "_scale": torch.tensor(0.01)}


def with_old_buffers(name: str, x: torch.Tensor) -> dict:
    """Harmless: old checkpoints keep the rotary frequencies, and every loader leaves them out."""
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    return {name: x} | (extra if name == "model.norm.weight" else {})


def poisoned(value: float):
    def edit(name, x):
        if name == "model.layers.1.mlp.up_proj.weight":
            x[3, 3] = value
        return {name: x}

    return weights(edit)


def config_says(**changes):
    return lambda folder: edit_json(folder / "config.json", **changes)


def generation_says(**changes):
    return lambda folder: edit_json(folder / "generation_config.json", **changes)


def quantised(**settings):
    return config_says(quantization_config=settings)


def removed(*names: str):
    return lambda folder: [(folder / name).unlink() for name in names]


def both(first, second):
    return lambda folder: (first(folder), second(folder))


def cut_in_half(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def saved_as(kind: str, class_name: str, **overrides):
    """The checkpoint of another class."""

    def damage(folder):
        default = transformers.CONFIG_MAPPING[kind]()
        config = type(default)(**small_arguments(default) | overrides)
        getattr(transformers, class_name)(config).save_pretrained(folder)

    return damage


def with_adapter(folder: Path) -> None:
    """PEFT's files: a low-rank change of a model."""
    edit_json(
        folder / "adapter_config.json",
        peft_type="LORA",
        task_type="CAUSAL_LM",
        r=4,
        lora_alpha=8,
        base_model_name_or_path="nobody/no-such-model",
        target_modules=["q_proj"],
    )
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    change = {key + "A.weight": torch.ones(4, 32), key + "B.weight": torch.ones(32, 4)}
    save_file(change, folder / "adapter_model.safetensors")


def tokenizer_says(**settings):
    return lambda folder: edit_json(folder / "tokenizer_config.json", **settings)


def tokenizer_has(**parts):
    return lambda folder: edit_json(folder / "tokenizer.json", **parts)


def special(*words: str):
    """These words become special tokens; one that is new is added behind the vocabulary."""
    flags = dict.fromkeys(["single_word", "lstrip", "rstrip", "normalized"], False)
    numbers = {word: number for number, word in enumerate(soar.VOCABULARY)}
    added = [
        {"id": numbers.get(word, VOCAB), "content": word, "special": True} | flags for word in words
    ]
    return tokenizer_has(added_tokens=added)


def template(text: str):
    return lambda folder: (folder / "chat_template.jinja").write_text(text)


TAGS = ["<question>", "</question>", "<answer>", "</answer>"]
EOS_AFTER_ALL = {
    "type": "TemplateProcessing",
    "single": [
        {"Sequence": {"id": "A", "type_id": 0}},
        {"SpecialToken": {"id": "<eos>", "type_id": 0}},
    ],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
    "special_tokens": {"<eos>": {"id": "<eos>", "ids": [1], "tokens": ["<eos>"]}},
}
CUT = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
LAST = VOCAB - 1  # the id of a word that ends each turn in the template below
TURNS = (
    "{% for m in messages %}{{ m.role + ' ' + m.content + ' LAST ' }}{% endfor %}{{ 'assistant ' }}"
)
TURNS = TURNS.replace("LAST", soar.VOCABULARY[LAST])
UNSAVABLE = dict(do_sample=False, temperature=0.9, top_p=0.6)
NO_EOS = both(config_says(eos_token_id=None), generation_says(eos_token_id=None))
NO_TOKENS = tokenizer_says(eos_token=None, pad_token=None)

# name -> damage. Names that begin with "chat" are run with --chat.
REFUSED = {
    # weights that do not fit the model, which would be random or left out
    "module. before every name": weights(lambda name, x: {"module." + name: x}),
    "a layer is missing": without("layers.1."),
    "a weight is missing": without("layers.1.mlp.up_proj"),
    "the head is missing": without("lm_head"),
    "a layer too many in the config": config_says(num_hidden_layers=3),
    "a layer too few in the config": config_says(num_hidden_layers=1),
    "another width in the config": config_says(intermediate_size=128),
    "another vocabulary in the config": config_says(vocab_size=VOCAB + 8),
    "a classifier": saved_as("llama", "LlamaForSequenceClassification"),
    "a classifier, tied": saved_as(
        "llama", "LlamaForSequenceClassification", tie_word_embeddings=True
    ),
    "a model without head": saved_as("llama", "LlamaModel"),
    "an encoder": saved_as("bert", "BertModel"),
    "an encoder with its head": saved_as("bert", "BertForMaskedLM"),
    "an encoder-decoder": saved_as("t5", "T5ForConditionalGeneration", d_kv=8, d_ff=64),
    "an adapter alone": both(with_adapter, removed("config.json", "model.safetensors")),
    "an adapter beside its model": with_adapter,
    "quantised by bitsandbytes": quantised(quant_method="bitsandbytes", load_in_4bit=True),
    "quantised by gptq": quantised(quant_method="gptq", bits=4),
    "quantised by awq": quantised(quant_method="awq", bits=4),
    "quantised to fp8": quantised(quant_method="fp8"),
    "quantised by an unknown method": both(weights(as_integers), quantised(quant_method="abacus")),
    # files that are damaged, missing or not to be run
    "cut in half": cut_in_half,
    "no weights": removed("model.safetensors"),
    "no config": removed("config.json"),
    "no tokenizer": removed("tokenizer.json", "tokenizer_config.json"),
    "NaN in a weight": poisoned(math.nan),
    "infinity in a weight": poisoned(math.inf),
    "code of its own": config_says(
        model_type="abacus", auto_map={"AutoConfig": "c.C", "AutoModelForCausalLM": "m.M"}
    ),
    # ids, ends and templates that cannot work
    "ids beyond the embedding": saved_as("llama", "LlamaForCausalLM", vocab_size=50),
    "no EOS anywhere": both(NO_EOS, NO_TOKENS),
    "chat without a template": lambda folder: None,
    "chat: a template that raises": template(
        "{{ raise_exception('a system message must come first') }}"
    ),
    "chat: a template with a mistake": template("{% for m in messages %}{{ m.content }}"),
    "chat: a template that drops the text": template("{{ 'assistant ' }}"),
    "chat: a template beyond the embedding": both(
        special("<|turn|>"), template("<|turn|> " + TURNS)
    ),
}
RIGHT_ONES = {
    "float16": stored_as(torch.float16),
    "bfloat16": stored_as(torch.bfloat16),
    "bfloat16 in the config": config_says(dtype="bfloat16"),
    "buffers of an older version": weights(with_old_buffers),
    "EOS is 0": both(config_says(eos_token_id=0), generation_says(eos_token_id=0)),
    "the tokenizer's EOS is not listed": generation_says(eos_token_id=[60, 61]),
    "chat: the tokenizer's EOS is not listed": both(
        template(TURNS), generation_says(eos_token_id=[60, LAST])
    ),
    "no EOS and no padding in the tokenizer": NO_TOKENS,
    "flags that cannot be saved": generation_says(**UNSAVABLE),
    "flags that cannot be saved, and no EOS": both(generation_says(**UNSAVABLE), NO_EOS),
    "top-k and penalties": generation_says(
        do_sample=True,
        top_k=2,
        top_p=0.5,
        repetition_penalty=2.0,
        suppress_tokens=[5, 60],
        forced_eos_token_id=1,
    ),
    "a tokenizer that truncates": tokenizer_has(truncation=CUT),
    "tags are special tokens": special(*TAGS),
}
RIGHT_OR_REFUSED = {
    "EOS after every prompt": tokenizer_has(post_processor=EOS_AFTER_ALL),
    "EOS beyond the vocabulary": generation_says(eos_token_id=9999),
    "chat: the template's end of turn is not listed": both(
        special(soar.VOCABULARY[LAST]), template(TURNS)
    ),
    "chat: an ordinary word ends a turn": template(
        TURNS
    ),  # as a line break would, which must end nothing
}
ENDS = {  # where completions end, if not at 1 alone
    "EOS is 0": [{0}, {0, 1}],  # 1 is the tokenizer's
    "the tokenizer's EOS is not listed": [{1, 60, 61}],
    "chat: the tokenizer's EOS is not listed": [{1, 60, LAST}],
    "chat: the template's end of turn is not listed": [{1, LAST}],
    "EOS beyond the vocabulary": [{1}, {1, 9999}],
}
FAULTY = REFUSED | RIGHT_ONES | RIGHT_OR_REFUSED
PROBLEM = Problem(soar.worksheet(["4*5", "6+7"]), soar.worksheet([20, 13]))


def prompt_faults(policy, config: Config) -> list[str]:
    """All words of the prompt must be in it, in their order, and without --chat nothing else."""
    words = policy.student_text.replace("{problem}", PROBLEM.question).split()
    expected = [soar.VOCABULARY.index(word) for word in words]
    prompt = policy.student_prompt(PROBLEM)
    places = range(len(prompt) if config.chat else 1)
    parts = [prompt[i : i + len(expected)] if config.chat else prompt for i in places]
    return [] if expected in parts else ["the prompt"]


def text_faults(policy, config: Config) -> list[str]:
    """Tags must reach the parser. At a temperature of 100 all words are sampled."""
    config = dataclasses.replace(config, temperature=100.0)
    prompts = [policy.student_prompt(PROBLEM)] * 8
    rollouts = soar.sample(policy, prompts, 8, TOKENS, config, soar.seeded("tags"))
    numbers = [soar.VOCABULARY.index(tag) for tag in TAGS]
    sampled = [[number in rollout.completion for number in numbers] for rollout in rollouts]
    kept = [[tag in rollout.text for tag in TAGS] for rollout in rollouts]
    return [] if kept == sampled else ["tags are left out of the text"]


def faulty_verdict(name: str, folder: Path) -> tuple[str, str]:
    """(verdict, why): right, refused or SILENTLY WRONG."""
    config = small_config(
        temperature=0.7,
        kl=0.1,
        chat=name.startswith("chat"),
        student_tokens=TOKENS,
        teacher_tokens=TOKENS,
    )
    try:
        policy = soar.load_policy(str(folder), config, soar.Meter())
        soar.check_context(policy, [PROBLEM], config)
        soar.solve(policy, [PROBLEM], 2, config, soar.seeded("any"))
        ends = soar.eos_ids(policy.model)
        found = [] if ends in ENDS.get(name, [{1}]) else [f"completions end at {ends}"]
        found += saving_faults(policy, folder / "saved") + prompt_faults(policy, config)
        policy.model.generation_config.eos_token_id = 1  # the oracle's
        found += text_faults(policy, config) + faults(policy, oracle(folder, 0.7), config)
    except UserError as error:
        return "refused", str(error)
    return ("SILENTLY WRONG", "; ".join(found)) if found else ("right", "")


@pytest.mark.parametrize("name", FAULTY)
def test_every_faulty_folder_is_right_or_refused(name, tmp_path):
    """Random weights, ids of another model, ends that never come: a run with wrong numbers."""
    save_small("llama", tmp_path, dict(max_position_embeddings=256))
    FAULTY[name](tmp_path)
    verdict, why = faulty_verdict(name, tmp_path)
    allowed = ["refused"] * (name not in RIGHT_ONES) + ["right"] * (name not in REFUSED)
    assert verdict in allowed and "\n" not in why, (verdict, why)


# ======================================================================================================================
# eval.py
# ======================================================================================================================


@pytest.mark.parametrize(
    "rewards, step",
    [
        ([], 0),
        ([10.0], 1),
        ([10.0] * 300, 0),
        ([float(s) for s in range(100)], 100),  # never flat: the last step
        (
            [0.0] * 100 + [float(s) for s in range(50)] + [50.0] * 100,
            160,
        ),  # a slow start is not the end
        ([100.0 * (s >= 50) for s in range(120)], 62),
        ([float(s) for s in range(60)] + [30.0] * 60, 48),
    ],
)
def test_chosen_step(rewards, step):
    """The paper's rule taken literally stops before a curve has started; an unsmoothed one stops at the first bump."""
    assert abs(eval_.chosen_step(rewards) - step) <= 2
    assert abs(eval_.chosen_step([3 * r - 7 for r in rewards]) - step) <= 2, (
        "slopes are relative to the range"
    )


def test_chosen_step_with_noise():
    """Noise of a twentieth of the range must not stop a rise of 200 steps in its first half, nor hide its end."""
    random.seed(0)
    rewards = [min(s, 200) / 2 + random.gauss(0, 5) for s in range(400)]
    assert 100 <= eval_.chosen_step(rewards) <= 230


def test_nested():
    """SD over students of one teacher passed off as SD over teachers, or a division by n."""
    values = [[0.0, 0.2], [0.4, 0.6], [0.8, 1.0]]
    result = eval_.nested(values)
    assert result["n"] == 6 and result["mean"] == pytest.approx(0.5)
    assert result["sd"] == pytest.approx(statistics.stdev([0.0, 0.2, 0.4, 0.6, 0.8, 1.0]))
    assert result["sd_teachers"] == pytest.approx(statistics.stdev([0.1, 0.5, 0.9]))
    assert eval_.nested([[0.5]]) == {"mean": 0.5, "sd": None, "sd_teachers": None, "n": 1}
    assert (
        eval_.nested([[0.5, 0.7]])["sd_teachers"] is None and eval_.nested([[0.5, 0.7]])["sd"] > 0
    )


def test_bootstrap():
    """The interval is about problems: more of them narrow it; it is that of the binomial where problems are coins."""
    few, many = np.arange(50) % 2.0, np.arange(5000) % 2.0
    low, high = eval_.bootstrap([few])
    assert low < 0.5 < high and high - low == pytest.approx(2 * 1.96 * 0.5 / 50**0.5, rel=0.15)
    assert np.ptp(eval_.bootstrap([many])) < (high - low) / 5
    assert eval_.bootstrap([np.full(9, 0.25)]) == [0.25, 0.25]
    assert np.ptp(eval_.bootstrap([few, few])) < high - low, "two runs know more than one"


def test_vendi():
    """Identical items count once, orthogonal ones each, whatever their lengths; 2 + 1 of them by the formula."""
    assert eval_.vendi(np.ones((7, 3))) == pytest.approx(1)
    assert eval_.vendi(np.diag([1.0, 2, 3, 4])) == pytest.approx(4)
    two_and_one = np.array([[1.0, 0], [5.0, 0], [0, 2.0]])
    assert eval_.vendi(two_and_one) == pytest.approx(
        math.exp(-(2 / 3) * math.log(2 / 3) - (1 / 3) * math.log(1 / 3))
    )


@pytest.mark.parametrize(
    "question, answer, verdict",
    [
        ("a= 7*8", "a= 56", (True, True)),
        ("a= 7*8", "a= 54", (True, False)),
        ("a= 7*8 ,b= 4+5", "a= 56 ,b= 9", (True, True)),
        ("a= 7*8 ,b= 4+5", "a= 56", (True, False)),
        ("a= x*8", "a= 56", (False, False)),
        ("b= 7*8", "b= 56", (False, False)),
        ("a= 7*8 ,b= x*4", "a= 56 ,b= 8", (False, False)),
        ("hello", "a= 56", (False, False)),
        ("a= 7*8 ,c= 4+5", "a= 56 ,c= 9", (False, False)),
        ("a= 7*8 a= 7*8", "a= 56", (False, False)),
    ],
)
def test_judge(question, answer, verdict):
    """A worksheet with an unknown, or with labels out of order, is no well-posed problem."""
    assert eval_.judge(Problem(question, answer)) == verdict


def test_majority_agrees():
    """Votes are counted by value, not by spelling; a solution without a box has none."""
    assert eval_.majority_agrees(
        ["1/2", "3", "0.5", "3", r"\frac12", None, None, None, None], "0.50"
    )
    assert not eval_.majority_agrees(["3", "3", "2"], "2") and not eval_.majority_agrees(
        [None], "2"
    )


def test_student_rollouts(policy, monkeypatch):
    """The budget that Hard-Only gets is all that SOAR's students sampled, counted where they sample."""
    config, state, sampled, solve = small_config(tau=10.0), fresh_state(policy), [], soar.solve
    monkeypatch.setattr(
        soar,
        "solve",
        lambda *args, **more: sampled.append(len(args[1]) * args[2]) or solve(*args, **more),
    )
    hard_train = single_products(soar.make_world(0))
    run = eval_.Run(
        Path(),
        config,
        policy,
        hard_train,
        [],
        [soar.outer_step(policy, hard_train, state, config)],
        "",
        [],
    )
    assert eval_.student_rollouts(run) == sum(sampled)
    sampled.clear()
    run.config = dataclasses.replace(config, reward="learnability")
    run.log = [soar.outer_step(policy, hard_train, state, run.config)]
    assert eval_.kind_of(run.config) == "learnability"
    assert eval_.student_rollouts(run) == sum(sampled)


def test_inner_extra_counts():
    """Students are trained longer after a promotion."""
    config = Config(
        teacher_group=2,
        repeats=1,
        inner_steps=3,
        inner_extra=2,
        student_batch=4,
        student_group=5,
        reward_questions=8,
    )
    log = [{"promotion": None}, {"promotion": {"dataset": 0}}, {"promotion": None}]
    run = eval_.Run(Path(), config, None, [None] * 6, [], log, "", [])  # 6 hard problems, not 8
    assert eval_.student_rollouts(run) == 2 * (2 * 3 * 20 + 3 * 6) + (2 * 5 * 20 + 3 * 6)


TOY_EVAL = "--steps 4 --points 2 --synthetic-steps 2 --questions 6 --samples 32 --threads 1".split()


@pytest.fixture(scope="session")
def tiny_runs(cache, tmp_path_factory):
    """A grounded run with a promotion, one without promotion, and one of the learnability teacher, in the tiny world."""
    folder, runs = tmp_path_factory.mktemp("tiny-runs"), {}
    for name, flags in (
        ("grounded", []),
        ("no-promotion", ["--no-promotion"]),
        ("learnability", ["--reward", "learnability"]),
    ):
        runs[name] = folder / name
        assert (
            soar.main(
                [
                    *"--steps 2 --n 4 --teacher-group 2 --teacher-batch 1 --kl 0.001 --repeats 1 --inner-steps 2 --student-batch 4 --student-group 4 --fail-k 8 --pool 12 "
                    "--reward-questions 4 --eval-samples 1 --window 1 --tau -0.9".split(),
                    "--cache",
                    str(cache),
                    "--out",
                    str(runs[name]),
                    *flags,
                ]
            )
            == 0
        )
    return runs


def evaluated(folders, out, *flags) -> dict:
    assert eval_.main([*map(str, folders), *TOY_EVAL, "--out", str(out), *flags]) == 0
    return json.loads((out / "eval.json").read_text())


def test_every_method(tiny_runs, tmp_path, monkeypatch, capsys):
    """Each row is filled by the right run, nothing is computed twice, and the files say what the screen says."""
    runs = {name: copy_of(folder, tmp_path / name) for name, folder in tiny_runs.items()}
    result = evaluated(runs.values(), tmp_path / "out", "--methods", "all", "--seeds", "2")
    screen = capsys.readouterr().out
    assert list(result["methods"]) == list(eval_.METHODS)
    for name, entry in result["methods"].items():
        n = 1 if name in eval_.ONCE else 2
        assert all(
            0 <= entry[f"pass@{k}"]["mean"] <= 1 and entry[f"pass@{k}"]["n"] == n
            for k in (1, 4, 8, 16, 32)
        )
        assert (
            entry["rollouts"] == (0 if name in ("base", "ps", "solver") else entry["rollouts"])
            and f"| {name} " in screen
        )
    rollouts = 2 * (2 * 2 * 16 + 3 * 4)  # students of two outer steps
    assert result["runs"][0]["rollouts"] == rollouts
    assert result["methods"]["hard-only-equal"]["rollouts"] == math.ceil(rollouts / 16) * 16
    assert result["methods"]["hard-only-4x"]["rollouts"] == 4 * 64
    assert (
        result["methods"]["pq"]["rollouts"] == result["methods"]["hard-only"]["rollouts"] == 4 * 16
    )
    about = result["questions"]["pq"]
    lines = (runs["grounded"] / "promotion_questions.jsonl").read_text().splitlines()
    assert about["questions"]["mean"] == len(lines) and 1 <= about["vendi"]["mean"] <= len(lines)
    judged = [eval_.judge(Problem(**json.loads(line))) for line in lines]
    assert about["well-posed"]["mean"] == pytest.approx(sum(w for w, _ in judged) / len(judged))
    assert (tmp_path / "out" / "eval.md").read_text().strip() in screen
    kept = sorted(path.name for name in runs for path in (runs[name] / "eval").iterdir())
    students = [name for name in kept if not name.startswith(("questions-", "about-"))]
    assert len(students) == 2 * len(eval_.METHODS) - len(eval_.ONCE) and not any(
        name.endswith((".pt", ".tmp")) for name in kept
    )
    curve = result["methods"]["pq"]["curves"][1]
    assert [point["step"] for point in curve] == [0, 2, 4] and curve[-1]["pass@32"] >= curve[-1][
        "pass@1"
    ]
    for module, name in (
        (soar, "student_step"),
        (soar, "propose"),
        (soar, "right_counts"),
        (eval_, "embed"),
    ):
        monkeypatch.setattr(module, name, None)
    again = evaluated(runs.values(), tmp_path / "out", "--methods", "all", "--seeds", "2")
    assert again == result


def test_what_is_measured_by_default(tiny_runs, tmp_path, capsys):
    """Rows of the tiny world's table that a run cannot fill, a short table without a word, one row from the wrong run."""
    runs = [copy_of(tiny_runs[name], tmp_path / name) for name in ("learnability", "grounded")]
    flags = ["--steps", "1", "--samples", "32", "--seeds", "1", "--questions", "4"]
    assert eval_.main([str(runs[1]), *flags]) == 0
    alone = json.loads((runs[1] / "eval.json").read_text())["methods"]
    assert list(alone) == ["base", "hard-only-equal", "ps", "pq", "grounded-t", "base-t"]
    assert eval_.main([*map(str, runs), *flags]) == 0
    both = json.loads((runs[0] / "eval.json").read_text())["methods"]
    assert set(both) == {*alone, "intrinsic-t"}
    assert (
        both["hard-only-equal"]["rollouts"] == alone["hard-only-equal"]["rollouts"]
    )  # as SOAR, whichever run comes first
    assert "Vendi" in capsys.readouterr().out


def test_tiny_students_train_on_the_problems_alone():
    """The paper's schedule in the tiny world, after which all teachers look alike; and no way back to it."""
    run = argparse.Namespace(config=small_config())
    sized = eval_.sized(eval_.Settings(), run)
    assert (sized.steps, sized.synthetic_steps, sized.seeds, sized.points) == (20, 20, 5, 1)
    paper = eval_.sized(eval_.Settings(steps=200, seeds=2, points=20), run)
    assert (paper.steps, paper.synthetic_steps, paper.seeds, paper.points) == (200, 64, 2, 20)


def test_a_fresh_student_starts_from_the_base_model(tiny_runs, tmp_path, monkeypatch):
    """A student that starts where the one before it ended, or trains on the test half."""
    run = copy_of(tiny_runs["grounded"], tmp_path / "run")
    seen, student_step = [], soar.student_step

    def spy(policy, batch, moments, lr, config, key):
        if key[-1] == 0:  # its first step
            seen.append((same(policy.model.parameters(), policy.base), []))
        seen[-1][1].extend(batch)
        return student_step(policy, batch, moments, lr, config, key)

    monkeypatch.setattr(soar, "student_step", spy)
    evaluated([run], tmp_path / "out", "--methods", "ps,pq,hard-only", "--seeds", "1")
    opened = eval_.open_run(run, eval_.read_config(run, eval_.Settings()), eval_.Settings())
    assert [fresh for fresh, _ in seen] == [True, True] and not set(opened.train) & set(opened.test)
    assert set(seen[1][1]) <= set(opened.train)  # hard-only
    assert set(seen[0][1][:8]) <= set(opened.promotion_questions) and set(seen[0][1][8:]) <= set(
        opened.train
    )  # the curriculum
    settings = eval_.Settings(mix="mixed", steps=9, synthetic_steps=3)
    mixed, _ = eval_.schedule(opened, "pq", opened.promotion_questions, settings, ("key",))
    assert set(sum(mixed, [])) == set(opened.promotion_questions) | set(opened.train)


def test_an_interrupted_student_goes_on(tiny_runs, tmp_path, monkeypatch, capsys):
    """The same figures as without the interruption, and no step trained twice."""
    folders = [copy_of(tiny_runs["grounded"], tmp_path / name) for name in ("a", "b")]
    whole = evaluated(folders[:1], tmp_path / "a-out", "--methods", "pq", "--seeds", "1")
    update, steps = soar.policy_update, []

    def interrupted(*args):
        steps.append(len(steps))
        if len(steps) == 4:
            raise KeyboardInterrupt
        return update(*args)

    monkeypatch.setattr(soar, "policy_update", interrupted)
    argv = [
        str(folders[1]),
        *TOY_EVAL,
        "--out",
        str(tmp_path / "b-out"),
        "--methods",
        "pq",
        "--seeds",
        "1",
    ]
    assert eval_.main(argv) == 130 and "eval.py" in capsys.readouterr().err
    assert [path.suffix for path in (folders[1] / "eval").iterdir()] == [".pt"]
    part = evaluated(folders[1:], tmp_path / "b-out", "--methods", "pq", "--seeds", "1")
    assert (
        part["methods"] == whole["methods"] and len(steps) == 4 + 2
    )  # measured after 2 of 4 steps


def test_two_processes_evaluate_as_one(finished, tmp_path):
    """A student of eval.py that depends on the process that made it, or that is kept under another name."""
    flags = (
        "--methods base,hard-only,ps,pq --steps 3 --synthetic-steps 1 --points 2 --seeds 2".split()
    )
    left = []
    for number in ("1", "2"):
        run = copy_of(finished, tmp_path / number / "run")
        done = subprocess.run(
            [sys.executable, str(ROOT / "eval.py"), str(run), *flags, "--processes", number],
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert (done.returncode, done.stderr) == (0, "")
        files = {
            file.name: file.read_text()
            for file in (run / "eval").iterdir()
            if file.name != soar.LOCK
        }
        left.append((files, (run / "eval.md").read_text(encoding="utf-8")))
    assert left[0] == left[1] and len(left[0][0]) >= 6


def test_an_interrupted_student_holds_its_moments_once(tiny_runs, tmp_path, monkeypatch):
    """Fresh moments beside the loaded ones: 8 bytes a weight more than before the interruption."""
    folder, path = copy_of(tiny_runs["grounded"], tmp_path / "run"), tmp_path / "student.pt"
    settings = eval_.Settings(samples=32, points=2)
    run = eval_.open_run(folder, eval_.read_config(folder, settings), settings)
    result = {"points": [{"step": 0, "right": [0]}], "reward": [], "rollouts": 0}
    moments = soar.adamw_state(run.policy.model)
    torch.save({"weights": run.policy.base, "moments": moments, "result": result}, path)
    monkeypatch.setattr(soar, "adamw_state", None)
    batches = soar.batches_of(run.train, 2, run.config.student_batch, soar.seeded("order"))
    path = path.with_suffix(".json")
    job = eval_.Job(path, ("", ""), batches, run.test, run.config, settings, ("key",), 0)
    result = eval_.make_student(run.policy, job)
    assert len(result["points"]) == 3


@pytest.mark.parametrize(
    "preset, hard", [("class", 100), ("class", 300), ("long", 500), ("paper", 720), ("smoke", 16)]
)
@pytest.mark.parametrize("reward", ["grounded", "learnability"])
def test_evaluation_takes_no_longer_than_the_run(preset, hard, reward):
    """The paper's 1,500 steps by default: nine times the completions of the run whose claim they
    check. And rows of one table that differ in length: a learnability run samples a tenth."""
    config = soar.parse_config(["--dataset", "math", "--preset", preset, "--reward", reward])
    run = eval_.Run(Path(), config, None, [None] * (hard // 2), [None] * (hard // 2), [], "", [])
    settings = eval_.sized(eval_.Settings(), run)
    grounded, questions = dataclasses.replace(config, reward="grounded"), config.reward_questions
    whole = config.steps * soar.student_completions(grounded, 0, min(hard // 2, questions))
    measured = hard // 2 * settings.samples
    fresh = (
        settings.steps * config.student_batch * config.student_group
        + (settings.points + 1) * measured
    )
    assert 1 <= settings.points <= settings.steps <= 1500
    assert settings.synthetic_steps <= settings.steps / 2
    if preset != "smoke":  # which is too short for anything
        assert 2 * fresh + 2 * measured <= whole
        assert settings.steps == 1500 or 2 * fresh + 2 * measured > 0.9 * whole
    given = eval_.sized(eval_.Settings(steps=1500, points=7), run)
    assert (given.steps, given.points, given.synthetic_steps) == (1500, 7, 64)


def test_transfer_leaves_out_known_problems(finished, tmp_path, capsys):
    """Problems of the other set that SOAR has trained on must not count as transfer, in whatever dress."""
    run, other = copy_of(finished, tmp_path / "run"), tmp_path / "other.jsonl"
    known = eval_.open_run(run, eval_.read_config(run, eval_.Settings()), eval_.Settings()).train[
        :3
    ]
    new = [
        Problem(soar.worksheet([f"{x}*9", f"{x}*8", f"{x}*7"]), "a= 1 ,b= 1 ,c= 1")
        for x in range(4, 10)
    ]
    spaced = [
        Problem("$" + problem.question.replace(" ", "  ").upper() + r"\!$.", problem.answer)
        for problem in known
    ]
    other.write_text("".join(json.dumps(vars(problem)) + "\n" for problem in spaced + new))
    evaluated([run], tmp_path / "out", "--methods", "base", "--dataset", str(other))
    assert (
        "3 hard train and 3 hard test problems" in (screen := capsys.readouterr().out)
        and "; 3 problems" in screen
    )


def test_real_problems_get_a_majority_vote(finished, tmp_path):
    """What is measured is agreement with a vote, so the word correct must not appear."""
    result = evaluated([copy_of(finished, tmp_path / "run")], tmp_path / "out", "--methods", "pq")
    assert set(result["questions"]["pq"]) == {
        "questions",
        "vendi",
        "agrees with the base model's majority vote",
    }
    assert 0 <= result["questions"]["pq"]["agrees with the base model's majority vote"]["mean"] <= 1


def test_bad_input_to_eval(tiny_runs, finished, tmp_path, capsys, monkeypatch):
    """One sentence each, that says what to do."""
    run = copy_of(tiny_runs["grounded"], tmp_path / "run")

    def refused_eval(argv, *words):
        capsys.readouterr()
        assert eval_.main([*map(str, argv)]) == 2
        error = capsys.readouterr().err
        assert (
            error.startswith("eval: ")
            and error.count("\n") == 1
            and all(word in error for word in words)
        ), error

    refused_eval([])
    refused_eval([tmp_path / "nothing"], "nothing", "no run folder")
    refused_eval([run, "--samples", "16"], "--samples", "at least 32")
    refused_eval([run, "--methods", "ps,best"], "best", "pq")
    refused_eval([run, "--methods", "intrinsic-t"], "intrinsic-t", "learnability")
    refused_eval([run, "--mix", "shaken"], "--mix")
    refused_eval([run, "--seeds", "-1"], "--seeds")
    refused_eval([run, "--dataset", "math"], "math", "tiny")
    refused_eval([run, finished], "data sets")
    refused_eval([run, "--threads", "-1"], "--threads")
    refused_eval([run, "--curated", tmp_path / "no.jsonl"], "no.jsonl")
    refused_eval([tmp_path], "no run folder")
    assert not (tmp_path / soar.LOCK).exists()  # no lock where there is no run
    refused_eval(["--benchmark", "--prompts", "0"], "at least 1")
    refused_eval(
        [copy_of(finished, tmp_path / "real"), *TOY_EVAL, "--methods", "upper"], "--curated"
    )
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    refused_eval([run, "--plot"], "matplotlib", "pip install")
    with (run / "log.jsonl").open("a") as file:
        file.write("nonsense\n")
    refused_eval([run], "log.jsonl", "damaged")
    shutil.copy(tiny_runs["grounded"] / "log.jsonl", run)
    shutil.rmtree(run / "teacher")
    refused_eval([run, "--methods", "solver", *TOY_EVAL], "teacher")
    shutil.rmtree(run / "student")
    refused_eval([run, "--methods", "ps", *TOY_EVAL], "student")
    (run / "report.json").unlink()
    refused_eval([run], "not finished", "--resume")
    (run / "report.json").write_text("{}")
    (run / "config.json").write_text("{")
    refused_eval([run], "config.json", "damaged")


def damaged_runs() -> dict:
    """name -> what is done to a run folder, whose files then contradict each other."""

    def drop(name, keep):
        return lambda run: (run / name).write_text(
            "".join((run / name).read_text().splitlines(True)[:keep])
        )

    def edit(name, **changes):
        return lambda run: (run / name).write_text(
            json.dumps(json.loads((run / name).read_text()) | changes)
        )

    return {
        "questions gone": lambda run: (run / "promotion_questions.jsonl").unlink(),
        "questions cut": drop("promotion_questions.jsonl", 3),
        "log cut": drop("log.jsonl", 1),
        "log empty": drop("log.jsonl", 0),
        "the teacher as student": lambda run: shutil.copy(
            run / "teacher" / "model.safetensors", run / "student"
        ),
        "a flag is missing": lambda run: (run / "config.json").write_text(
            json.dumps(
                {
                    k: v
                    for k, v in json.loads((run / "config.json").read_text()).items()
                    if k != "student_lr"
                }
            )
        ),
        "a flag of another type": edit("config.json", student_batch="16"),
        "no flags": lambda run: (run / "config.json").write_text("[]"),
        "a report in bytes": lambda run: (run / "report.json").write_bytes(b"\xff\xfe"),
    }


@pytest.mark.parametrize("name", damaged_runs())
def test_files_that_contradict_each_other(name, tiny_runs, tmp_path, capsys):
    """A promoted student that was the base model, PQ without questions: another method under the name of one."""
    run = copy_of(tiny_runs["grounded"], tmp_path / "run")
    damaged_runs()[name](run)
    assert eval_.main([str(run), *TOY_EVAL, "--methods", "ps,pq", "--seeds", "1"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("eval: ") and error.count("\n") == 1, error


def test_runs_that_cannot_be_averaged(tiny_runs, tmp_path, capsys):
    """The same run twice makes every spread smaller; runs with different flags make a mean of nothing."""
    one, two, other = (
        copy_of(tiny_runs["grounded"], tmp_path / name) for name in ("one", "two", "other")
    )
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"seed": 7, "tau": 0.5}))
    for runs, words in (
        ([one, one], "same run"),
        ([one, two], "same run"),
        ([one, other], "--tau"),
    ):
        assert eval_.main([*map(str, runs), *TOY_EVAL, "--methods", "base"]) == 2
        assert words in capsys.readouterr().err


def test_curated_problems_are_no_test_problems(finished, tmp_path, capsys):
    """--curated with the test problems in it: students were tested on what they had trained on."""
    run, file = copy_of(finished, tmp_path / "run"), tmp_path / "curated.jsonl"
    opened = eval_.open_run(run, eval_.read_config(run, eval_.Settings()), eval_.Settings())
    rows = [
        vars(problem) | {"question": problem.question.replace("a=", "A=  ")}
        for problem in opened.test
    ]
    file.write_text(
        "".join(json.dumps(row) + "\n" for row in rows + [{"question": "2+2", "answer": "4"}])
    )
    kept = eval_.curated_problems(opened, eval_.Settings(curated=str(file)))
    assert (
        kept == [Problem("2+2", "4")]
        and f"{len(rows)} of {len(rows) + 1}" in capsys.readouterr().out
    )


def test_plot(tiny_runs, tmp_path):
    """All four panels from all kinds of run."""
    pytest.importorskip("matplotlib")
    folders = [copy_of(folder, tmp_path / name) for name, folder in tiny_runs.items()]
    evaluated(folders, tmp_path / "out", "--methods", "base,ps,pq", "--plot")
    assert (tmp_path / "out" / "eval.png").read_bytes().startswith(b"\x89PNG")


def test_transfer_to_nothing_new(finished, tmp_path, capsys):
    """A data set of which SOAR has seen every problem ended in a traceback."""
    run, other = copy_of(finished, tmp_path / "run"), tmp_path / "other.jsonl"
    known = eval_.open_run(run, eval_.read_config(run, eval_.Settings()), eval_.Settings()).train
    other.write_text("".join(json.dumps(vars(problem)) + "\n" for problem in known))
    assert eval_.main([str(run), "--methods", "base", "--dataset", str(other)]) == 2
    assert "knows all problems" in capsys.readouterr().err


def test_the_paper_has_a_row_of_its_own():
    """SeRL, which is not implemented here, as a method of ours, without its figures, or on data sets it was not run on."""
    figure = {"mean": 0.5, "sd": None, "n": 1}
    entry = {column: figure for column in eval_.COLUMNS} | {"rollouts": 0}
    table = eval_.methods_table({"pq": entry}, {}, "math")
    assert list(table) == ["pq", "SeRL, step 100"] and table["pq"]["pass@1"] == "50.0 [1.7]"
    assert " ".join(table["SeRL, step 100"].values()) == "[0.5] [2.1] [4.0] [7.3] [12.4]"
    assert list(table["SeRL, step 100"]) == eval_.COLUMNS
    assert list(eval_.methods_table({"pq": entry}, {}, "harp")) == ["pq"]


def test_benchmark(base, monkeypatch, capsys):
    """A way that breaks, one that counts the tokens behind an end, too, and one that has other limits."""
    monkeypatch.setattr(soar, "tiny_base_model", lambda config: base)
    flags = ["--benchmark", "--prompts", "3", "--samples", "64", "--repeats", "1"]
    assert eval_.main(flags) == 0
    lines = [line.split("|") for line in capsys.readouterr().out.strip().splitlines()]
    table = {cells[1].strip(): [cell.strip() for cell in cells[2:5]] for cells in lines[2:]}
    assert list(table) == ["soar.py", "generate, dynamic cache", "generate, static cache"]
    assert all(float(speed) > 0 and float(ratio) > 0 for speed, ratio, _ in table.values())
    assert table["soar.py"][1] == "1"
    config = Config(**soar.PRESETS["tiny"] | {"kl": 0.0})
    policy = soar.load_policy(base, config, soar.Meter())
    questions = ("a= 7*8", "a= 4+5 ,b= 6*7 ,c= 9*9")
    prompts = [policy.student_prompt(Problem(question, "")) for question in questions]
    limits = eval_.Benchmark(samples=256)
    ways = (eval_.sample_ours, eval_.sample_theirs)
    lengths = [way(policy.model, prompts, 1, limits) for way in ways]
    for ours, theirs in zip(*(row.view(2, 256).double() for row in lengths)):
        assert 1 <= ours.min() and 1 <= theirs.min() and max(ours.max(), theirs.max()) <= 24
        spread = (ours.var() / 256 + theirs.var() / 256) ** 0.5
        assert abs(ours.mean() - theirs.mean()) < 4 * spread + 0.1


def test_eval_settings_have_help(capsys):
    """A flag without a comment, or one that --help does not show."""
    fields = [*dataclasses.fields(eval_.Settings), *dataclasses.fields(eval_.Benchmark)]
    assert all(field.metadata["help"] for field in fields)
    for argv, kind in ((["--help"], eval_.Settings), (["--benchmark", "--help"], eval_.Benchmark)):
        with pytest.raises(SystemExit) as end:
            eval_.main(argv)
        shown = capsys.readouterr().out
        assert end.value.code == 0
        assert all(soar.flag(field.name) in shown for field in dataclasses.fields(kind))


# ==================================================================================================
# Assignments: the judges are judged
# ==================================================================================================

# For each function of an assignment a right solution that is not soar.py's, and edits of it that
# are typical mistakes: the tests that judge the function must let the one pass and no other.

RLOO = """
def rloo_advantages(rewards, group_size):
    advantages = []
    for group in rewards.split(group_size):
        advantages.append((group - group.mean()) * group_size / (group_size - 1))
    return torch.cat(advantages)
"""
PASS_AT_K = """
def pass_at_k(n, c, k):
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)
"""
LEARNING_RATE = """
def learning_rate(peak, step, total, warmup):
    if step < warmup:
        return (step + 1) / warmup * peak
    done = min(step, total) - warmup
    return peak * math.cos(math.pi / 2 * done / max(1, total - warmup)) ** 2
"""
PARSE_PROBLEM = """
def parse_problem(text):
    tags = [(m.start(), m.end(), m[0]) for m in re.finditer("<question>|<answer>", text)]
    tags.append((len(text), len(text), ""))
    for first, second, third in zip(tags, tags[1:], tags[2:]):
        if first[2] != "<question>" or second[2] != "<answer>":
            continue
        question, question_closes, _ = text[first[1] : second[0]].partition("</question>")
        answer, answer_closes, _ = text[second[1] : third[0]].partition("</answer>")
        if question_closes and answer_closes:
            box = extract_boxed(answer)
            if box is None or not question.strip() or not parses(box):
                return None
            return Problem(question.strip(), box.strip())
    return None
"""
STUDENT_REWARD = r"""
def student_reward(completion, gold):
    found = []
    for box in boxes(completion):
        found.append(box)
        if len(found) > MAX_GUESSES:
            break
    if not found:
        return 0.0
    if answers_equal(found[0], gold):
        return RIGHT
    formulas = re.finditer(r"\$([^$]+)\$|\\\((.+?)\\\)", completion)
    guesses = [formula[1] or formula[2] for formula in formulas]
    guesses = guesses[::-1] + found[1:]
    for guess in guesses[:MAX_GUESSES]:
        if answers_equal(guess, gold):
            return 20.0
    return 10.0
"""
PICK_TOKENS = """
def pick_tokens(logits, temperature, uniforms=None):
    if uniforms is None:
        best = logits.argmax(-1)
        return best, torch.zeros(len(best))
    logprobs = (logits.double() / temperature).log_softmax(-1)
    below = logprobs.exp().cumsum(-1) <= uniforms[:, None]
    tokens = below.sum(-1).clamp(max=logits.shape[1] - 1)
    return tokens, logprobs.gather(-1, tokens[:, None])[:, 0].float()
"""
NAIVE_LOGPROBS = """
def completion_logprobs(model, rollouts, temperature, rows=512):
    sums = []
    for rollout in rollouts:
        ids = torch.tensor([rollout.prompt + rollout.completion], device=model.device)
        start = len(rollout.prompt)
        logits = model(input_ids=ids).logits[0].float()
        logprobs = (logits / temperature).log_softmax(-1)[start - 1 : -1]
        sums.append(logprobs.gather(-1, ids[0, start:, None]).sum())
    return torch.stack(sums)
"""
SMALL_LOGPROBS = """
def completion_logprobs(model, rollouts, temperature, rows=512):
    def one(rollout):
        ids = torch.tensor([rollout.prompt + rollout.completion], device=model.device)
        start = len(rollout.prompt)
        hidden = model.base_model(input_ids=ids).last_hidden_state[0, start - 1 : -1]
        logits = next_token_logits(model, hidden).float() / temperature
        chosen = logits.gather(-1, ids[0, start:, None])[:, 0]
        return (chosen - logits.logsumexp(-1)).sum()

    return torch.stack([checkpoint(one, rollout, use_reentrant=False) for rollout in rollouts])
"""
POLICY_UPDATE = """
def policy_update(policy, rollouts, advantages, moments, lr, config, rounding=None):
    divergences, gaps = [], []
    policy.model.train(config.checkpointing)
    for rollout, advantage in zip(rollouts, advantages.tolist()):
        if advantage == 0:
            continue
        logprob = completion_logprobs(policy.model, [rollout], config.temperature)
        weight, k1 = advantage, 0.0
        if config.kl:
            with torch.no_grad():
                reference = completion_logprobs(policy.reference, [rollout], config.temperature)
            k1 = (logprob - reference).item()
            divergences.append(k1)
        weight -= config.kl * k1
        loss = -weight * logprob[0] / len(rollouts)
        loss.backward()
        gaps += sampler_gaps([rollout], logprob)
    policy.model.eval()
    if not gaps:
        return {"grad_norm": 0.0, "kl": 0.0, "sampler_gap": 0.0}
    norm = adamw_step(policy.model, moments, lr, config, rounding)
    kl = sum(divergences) / max(1, len(divergences))
    return {"grad_norm": norm, "kl": kl, "sampler_gap": sum(gaps) / len(gaps)}
"""
REJECTION_GAP = """
def rejection_gap(logits, accepted, weights):
    logits = logits.detach().requires_grad_()
    pi_0 = logits.softmax(0)
    mass = pi_0[accepted].sum()
    pi = pi_0[accepted] / mass
    (gradient,) = torch.autograd.grad(mass.log(), logits, retain_graph=True)
    return ((pi * weights[accepted]).sum() * gradient).detach()
"""
KL_GAP = """
def kl_gap(logits, accepted, reference, kl):
    k1 = logits.log_softmax(0) - reference.log_softmax(0)
    return rejection_gap(logits, accepted, -kl * k1)
"""
MEDIAN_STUDENT = """
def median_student(rewards):
    return int(np.argsort(rewards, kind="stable")[len(rewards) // 2])
"""
PROMOTION_DUE = """
def promotion_due(history, config):
    window = history[-config.window :]
    if not config.promotion or len(window) < config.window:
        return False
    return np.mean(window) > config.tau
"""
PROMOTE = """
def promote(policy, champion, datasets, hard_train, state, config):
    restore(policy.model, champion.weights)
    right = greedy_right(policy, hard_train, config)
    accuracy = float(right.sum()) / len(hard_train)
    if accuracy > state.best_accuracy:
        save_model(policy.model, policy.tokenizer, Path(config.out) / "student")
        state.best_accuracy = accuracy
        state.student_key = weights_key(champion.weights)
    state.baseline = champion.weights
    state.promotions = state.promotions + 1
    state.history = []
    for problem in datasets[champion.dataset]:
        state.promotion_questions.append(vars(problem))
    return {"dataset": champion.dataset, "student": champion.student, "accuracy": accuracy}
"""
GROUNDED_REWARDS = """
def grounded_rewards(policy, datasets, questions, state, config):
    steps = config.inner_steps + config.inner_extra * state.promotions
    restore(policy.model, state.baseline)
    before = greedy_right(policy, questions, config)
    gains = torch.zeros(len(datasets), config.repeats, len(questions), dtype=torch.float64)
    students, logs = {}, []
    for j in range(config.repeats):
        for k, dataset in enumerate(datasets):
            restore(policy.model, state.baseline)  # a fresh student
            key = ("my students", config.seed, state.step, j, k)
            batches = batches_of(dataset, steps, config.student_batch, seeded(*key))
            logs += train_student(policy, batches, config, key)
            students[k, j] = snapshot(policy.model)
            gains[k, j] = greedy_right(policy, questions, config) - before
    rewards = gains.mean(2)
    errors = (gains.var(2, correction=0) / len(questions)).sqrt()
    k = int(rewards.mean(1).argmax())
    j = median_student(rewards[k].tolist())
    figures = {name: sum(log[name] for log in logs) / len(logs) for name in logs[0]}
    figures["accuracy_before"] = before.mean().item()
    return rewards, errors, Champion(k, j, students[k, j]), figures
"""
OUTER_STEP = """
def outer_step(policy, hard_train, state, config):
    n, step = config.n, state.step
    K = config.teacher_batch * config.teacher_group
    restore(policy.model, state.teacher)
    luck = seeded("my proposals", config.seed, step)
    rollouts, problems, figures = propose(policy, K * n, config, luck)
    datasets = [problems[k * n : (k + 1) * n] for k in range(K)]
    if config.reward == "learnability":
        measured = learnability_rewards(policy, datasets, state, config)
    else:
        rng = random.Random(f"my questions {config.seed} {step}")
        questions = rng.sample(hard_train, min(len(hard_train), config.reward_questions))
        measured = grounded_rewards(policy, datasets, questions, state, config)
    rewards, errors, champion, training = measured
    worth = rewards.mean(1)
    advantages = rloo_advantages(worth, config.teacher_group)
    spread = advantages[:, None].expand(-1, n).flatten()
    figures |= teacher_update(policy, rollouts, spread, state, config)
    state.history = state.history + [worth.mean().item()]
    average = float(np.mean(state.history[-config.window :]))
    promotion = None
    if champion is not None and promotion_due(state.history, config):
        promotion = promote(policy, champion, datasets, hard_train, state, config)
    row = {"step": step, "rewards": rewards.tolist(), "errors": errors.tolist()}
    row |= {"reward": worth.mean().item(), "average": average, "promotion": promotion}
    row |= {"teacher": figures, "student": training}
    if config.dataset == "tiny":
        row["topics"] = topic_shares(problems)
    state.log.append(row)
    for k, dataset in enumerate(datasets):
        for problem in dataset:
            place = {"step": step, "dataset": k, "reward": worth[k].item()}
            state.questions.append(place | vars(problem))
    state.step = step + 1
    return row
"""
# Function -> its right solution.
SOLUTIONS = {
    "rloo_advantages": RLOO,
    "pass_at_k": PASS_AT_K,
    "learning_rate": LEARNING_RATE,
    "parse_problem": PARSE_PROBLEM,
    "student_reward": STUDENT_REWARD,
    "pick_tokens": PICK_TOKENS,
    "completion_logprobs": NAIVE_LOGPROBS,
    "policy_update": POLICY_UPDATE,
    "rejection_gap": REJECTION_GAP,
    "kl_gap": KL_GAP,
    "median_student": MEDIAN_STUDENT,
    "promotion_due": PROMOTION_DUE,
    "promote": PROMOTE,
    "grounded_rewards": GROUNDED_REWARDS,
    "outer_step": OUTER_STEP,
}
# Function, the mistake, what it is in the solution above, and what stands there instead.
MISTAKES = [
    ("rloo_advantages", "no leave-one-out", " * group_size / (group_size - 1)", ""),
    ("rloo_advantages", "groups of 3 for ever", "group_size / (group_size - 1)", "3 / 2"),
    ("rloo_advantages", "one group", "rewards.split(group_size)", "[rewards]"),
    (
        "rloo_advantages",
        "standard deviation",
        "* group_size / (group_size - 1)",
        "/ (group.std() + 1e-6)",
    ),
    (
        "pass_at_k",
        "a sample twice",
        "math.comb(n - c, k) / math.comb(n, k)",
        "(1 - c / n) ** k",
    ),
    (
        "pass_at_k",
        "a share",
        "1.0 - math.comb(n - c, k) / math.comb(n, k)",
        "min(1.0, c * k / n)",
    ),
    ("learning_rate", "first step of size 0", "(step + 1) / warmup", "step / warmup"),
    ("learning_rate", "rises again", "min(step, total)", "step"),
    ("learning_rate", "warm-up forgotten in the cosine", "max(1, total - warmup)", "total"),
    ("parse_problem", "unreadable answer", " or not parses(box)", ""),
    ("parse_problem", "no question", " or not question.strip()", ""),
    (
        "parse_problem",
        "the next one that can be used",
        "return None\n            ",
        "continue\n            ",
    ),
    ("parse_problem", "a question for an answer", ' or second[2] != "<answer>"', ""),
    ("student_reward", "first box", "found[0], gold", "found[-1], gold"),
    ("student_reward", "a list of guesses pays", "guesses[:MAX_GUESSES]", "guesses"),
    ("student_reward", "the first guesses", "guesses[::-1]", "guesses"),
    ("student_reward", "no box for the partial reward", "if not found:", "if not completion:"),
    ("pick_tokens", "temperature forgotten", " / temperature", ""),
    ("pick_tokens", "impossible token at u = 0", "<= uniforms", "< uniforms"),
    (
        "pick_tokens",
        "log-probability without temperature",
        "logprobs.gather",
        "logits.log_softmax(-1).gather",
    ),
    (
        "pick_tokens",
        "top-k",
        "    below",
        "    worst = logprobs < logprobs.topk(min(9, logprobs.shape[1])).values[:, -1:]\n"
        "    logprobs = logprobs.masked_fill(worst, -math.inf).log_softmax(-1)\n    below",
    ),
    ("completion_logprobs", "EOS untrained", ".sum())", "[:-1].sum())"),
    ("completion_logprobs", "off by one", "[start - 1 : -1]", "[start:]"),
    ("completion_logprobs", "mean over tokens", ".sum())", ".mean())"),
    ("completion_logprobs", "temperature forgotten", " / temperature", ""),
    ("completion_logprobs", "the prompt counted in", "start = len(rollout.prompt)", "start = 1"),
    ("policy_update", "sign", "-weight * logprob", "weight * logprob"),
    (
        "policy_update",
        "mean over tokens",
        "len(rollouts)",
        "len(rollouts) / len(rollout.completion)",
    ),
    (
        "policy_update",
        "flat groups not in the denominator",
        "/ len(rollouts)",
        "/ int(advantages.count_nonzero())",
    ),
    ("policy_update", "k1 as a loss", "weight -= config.kl * k1", "weight -= config.kl"),
    (
        "policy_update",
        "k3 as a loss",
        "weight -= config.kl * k1",
        "weight -= config.kl * (1 - math.exp(-k1))",
    ),
    (
        "policy_update",
        "k1 not held constant",
        "(logprob - reference).item()",
        "(logprob - reference)[0]",
    ),
    (
        "policy_update",
        "EOS untrained",
        "policy.model, [rollout]",
        "policy.model, [dataclasses.replace(rollout, completion=rollout.completion[:-1])]",
    ),
    ("policy_update", "train mode for ever", "policy.model.eval()", "pass"),
    ("rejection_gap", "not normalised", "pi_0[accepted] / mass", "pi_0[accepted]"),
    ("rejection_gap", "mass, not its logarithm", "mass.log()", "mass"),
    (
        "rejection_gap",
        "always zero",
        "weights[accepted]",
        "(weights - weights[accepted] @ pi)[accepted]",
    ),
    ("kl_gap", "sign", "-kl * k1", "kl * k1"),
    ("kl_gap", "reference not normalised", "reference.log_softmax(0)", "reference"),
    ("kl_gap", "nothing missing", "-kl * k1", "0 * k1"),
    ("median_student", "best student", "[len(rewards) // 2]", "[-1]"),
    ("median_student", "worse of the middle ones", "len(rewards) // 2", "(len(rewards) - 1) // 2"),
    ("median_student", "second best", "[len(rewards) // 2]", "[max(0, len(rewards) - 2)]"),
    ("promotion_due", "window not full", "len(window) < config.window", "not window"),
    ("promotion_due", "exactly tau", "> config.tau", ">= config.tau"),
    ("promotion_due", "all steps", "np.mean(window)", "np.mean(history)"),
    ("promotion_due", "--no-promotion", "not config.promotion or ", ""),
    ("promote", "old rewards stay", "state.history = []", "pass"),
    ("promote", "the last one is kept", "if accuracy > state.best_accuracy", "if True"),
    ("promote", "D_best of another dataset", "datasets[champion.dataset]", "datasets[0]"),
    ("promote", "no new baseline", "state.baseline = champion.weights", "pass"),
    (
        "grounded_rewards",
        "a student after the other",
        "restore(policy.model, state.baseline)  #",
        "#",
    ),
    (
        "grounded_rewards",
        "gain over the base model",
        "restore(policy.model, state.baseline)\n    before",
        "restore(policy.model, policy.base)\n    before",
    ),
    (
        "grounded_rewards",
        "best student",
        "median_student(rewards[k].tolist())",
        "int(rewards[k].argmax())",
    ),
    (
        "grounded_rewards",
        "dataset of the best student",
        "rewards.mean(1).argmax()",
        "rewards.max(1).values.argmax()",
    ),
    ("grounded_rewards", "no steps more", " + config.inner_extra * state.promotions", ""),
    ("grounded_rewards", "standard deviation", " / len(questions)).sqrt()", ").sqrt()"),
    (
        "grounded_rewards",
        "weights of another student",
        "Champion(k, j, students[k, j])",
        "Champion(k, j, students[k, 0])",
    ),
    (
        "outer_step",
        "advantages of the wrong dataset",
        "advantages[:, None].expand(-1, n).flatten()",
        "advantages.repeat(n)",
    ),
    ("outer_step", "sign", "rollouts, spread,", "rollouts, -spread,"),
    (
        "outer_step",
        "one group",
        "rloo_advantages(worth, config.teacher_group)",
        "rloo_advantages(worth, K)",
    ),
    ("outer_step", "the student writes", "state.teacher", "state.baseline"),
    ("outer_step", "same questions", "my questions {config.seed} {step}", "{config.seed}"),
    ("outer_step", "same proposals", "config.seed, step)", "config.seed)"),
    ("outer_step", "no promotion", "champion is not None and", "False and"),
    (
        "outer_step",
        "promotion too early",
        "promotion_due(state.history, config)",
        "average > config.tau",
    ),
]


def define(monkeypatch, source: str) -> None:
    """The function of this source in soar, in place of the one that is there."""
    made = {}
    exec(source, vars(soar), made)
    for name, function in made.items():
        monkeypatch.setattr(soar, name, function, raising=False)


def judges_of(label: str) -> str:
    (tests,) = [labels[label] for labels in ASSIGNMENTS.values() if label in labels]
    return tests


@pytest.mark.parametrize("name", SOLUTIONS)
def test_another_solution_passes(name, monkeypatch):
    """A judge that looks at the way, not at what comes out."""
    define(monkeypatch, SOLUTIONS[name])
    assert failure(judges_of(name)) == ""


@pytest.mark.parametrize("name, mistake, right, wrong", MISTAKES)
def test_a_mistake_fails(name, mistake, right, wrong, monkeypatch):
    """A judge that lets a typical mistake pass, or that fails it for a reason that is none."""
    assert SOLUTIONS[name].count(right) == 1
    define(monkeypatch, SOLUTIONS[name].replace(right, wrong))
    reason = failure(judges_of(name))
    assert reason.startswith("test_") and "NameError" not in reason, reason


def test_full_logits_cost_a_part_of_the_score(monkeypatch):
    """The simple way must have its part, and the economical one the whole."""
    economical = "completion_logprobs without full logits"
    define(monkeypatch, NAIVE_LOGPROBS)
    assert "test_full_logits" in failure(judges_of(economical))
    define(monkeypatch, SMALL_LOGPROBS)
    assert failure(judges_of("completion_logprobs")) == failure(judges_of(economical)) == ""


def passes_examples(function, docstring: str) -> bool:
    """Does the function do what the examples of this docstring show?"""
    names = vars(soar) | {function.__name__: function}
    examples = doctest.DocTestParser().get_doctest(docstring, names, function.__name__, None, 0)
    return doctest.DocTestRunner(verbose=False).run(examples, out=lambda _: None).failed == 0


def test_examples_are_not_enough(monkeypatch):
    """Mistakes that the visible examples show already would prove nothing about the judges."""
    passing = set()
    given = {name: function for name, function in vars(soar).items() if name in SOLUTIONS}
    with_examples = {name for name, f in given.items() if ">>>" in f.__doc__}
    for name, _, right, wrong in MISTAKES:
        if name in with_examples:
            define(monkeypatch, SOLUTIONS[name].replace(right, wrong))
            if passes_examples(getattr(soar, name), given[name].__doc__):
                passing.add(name)
    assert passing == with_examples and len(passing) > 5


def test_assignments_name_what_is_there():
    """A function or a test that was renamed; a function without solution, or with one mistake."""
    functions = [label.split()[0] for labels in ASSIGNMENTS.values() for label in labels]
    assert set(functions) == set(SOLUTIONS)
    mistakes = Counter(name for name, *_ in MISTAKES)
    assert mistakes.keys() == set(SOLUTIONS) and min(mistakes.values()) >= 2
    assert set(HINTS) <= set(functions)
    for labels in ASSIGNMENTS.values():
        assert all(label.split()[0] in labels for label in labels)
        for tests in labels.values():
            assert all(callable(globals().get(test)) for test in tests.split())


@pytest.mark.parametrize("name", [name for name, labels in ASSIGNMENTS.items() if labels])
def test_a_file_with_holes_is_soar_else(name, tmp_path, capsys):
    """A hole that takes a docstring or a neighbour along; a file that is overwritten."""
    file = tmp_path / "my_soar.py"
    assert assignments_main(["--assignment", name, str(file)]) == 0
    written = file.read_text(encoding="utf-8")
    ours = {
        node.name: node for node in ast.parse(assignment_source(name)).body if hasattr(node, "name")
    }
    source = (ROOT / "soar.py").read_text(encoding="utf-8")
    originals = {node.name: node for node in ast.parse(source).body if hasattr(node, "name")}
    holes = {label.split()[0] for label in ASSIGNMENTS[name]}
    assert ours.keys() == originals.keys() | holes
    for function, node in ours.items():
        if function in holes:
            assert len(node.body) == 2 and ast.unparse(node.body[1]).startswith("raise NotImpl")
            assert ast.get_docstring(node)
        if function in originals and function in holes:
            before = originals[function]
            assert ast.unparse(node.args) == ast.unparse(before.args)
            assert ast.get_docstring(node) == ast.get_docstring(before)
        elif function in originals:
            assert ast.dump(node) == ast.dump(originals[function])
    capsys.readouterr()
    file.write_text("my own work")
    assert assignments_main(["--assignment", name, str(file)]) == 2
    assert file.read_text() == "my own work" and capsys.readouterr().err.count("\n") == 1
    assert written.count("raise NotImplementedError(") == len(holes)


def test_hints_name_every_key(toy_policy, tmp_path):
    """Rows and figures that others read, and of which the holes do not tell."""
    config = toy_config(tau=-10.0, out=str(tmp_path), repeats=1)
    state = fresh_state(toy_policy)
    row = soar.outer_step(toy_policy, about_facts(*range(8)), state, config)
    update = soar.teacher_update(toy_policy, [], torch.zeros(0), state, config)
    told = {
        "outer_step": [*row, *state.questions[0], "topics"],
        "promote": row["promotion"],
        "policy_update": update,
        "grounded_rewards": ["accuracy_before"],
    }
    for function, keys in told.items():
        for key in keys:
            assert re.search(rf"\b{key}\b", HINTS[function]), (function, key)


A1_GONE_WRONG = """
print("a line of a hundred characters " * 3_000_000)

def rloo_advantages(rewards, group_size):
    sys.exit("I give up")

def pass_at_k(n, c, k):
    while True:
        print(n)

def learning_rate(peak, step, total, warmup):
    os._exit(7)
"""


def test_whatever_a_student_hands_in_gets_its_line(tmp_path, monkeypatch, capsys):
    """A judge that hangs, dies or shows a traceback of its own with what it judges; a file that
    fails as a whole since one function does."""
    monkeypatch.setitem(globals(), "LIMIT", 15)
    source = (ROOT / "soar.py").read_text(encoding="utf-8")
    file = tmp_path / "my_soar.py"
    file.write_text(source.replace("\nif __name__ ==", A1_GONE_WRONG + "\nif __name__ =="), "utf-8")
    assert assignments_main(["--grade", "A1", str(file)]) == 1
    first, second, third, score = capsys.readouterr().out.splitlines()
    assert first.startswith("rloo_advantages  failed: test_") and "SystemExit" in first
    assert second.startswith("pass_at_k        failed: test_") and "no end after 15 s" in second
    assert third.startswith("learning_rate    failed: test_") and "exit code 7" in third
    assert score == "score: 0 of 3"
    for text, reason in (
        ("def f(:\n", "SyntaxError"),
        ("raise SystemExit(3)", "SystemExit"),
        ("import os\nos._exit(5)", "exit code 5"),
        ("import no_such_module", "ModuleNotFoundError"),
    ):
        file.write_text(text)
        assert assignments_main(["--grade", "A1", str(file)]) == 1
        *lines, score = capsys.readouterr().out.splitlines()
        assert len(lines) == 3 and all(reason in line for line in lines) and "0 of 3" in score


def test_the_solution_has_the_full_score(capsys):
    """A grade that soar.py itself does not reach."""
    assert assignments_main(["--grade", "A1", str(ROOT / "soar.py"), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["score"] == result["of"] == 3 and not any(result["failures"].values())


@pytest.mark.parametrize(
    "argv, word",
    [
        (["--grade", "A1", "no_such_file.py"], "no_such_file.py"),
        (["--grade", "A9", "soar.py"], "A9"),
        (["--grade", "A6", "report.pdf"], "report"),
        (["--assignment", "A6", "report.md"], "report"),
        (["--assignment", "A1", "no/such/folder/my_soar.py"], "folder"),
    ],
)
def test_bad_calls_of_the_grader(argv, word, capsys):
    """A traceback instead of a sentence; a bad call that reads as a failed assignment."""
    assert assignments_main(argv) == 2
    printed = capsys.readouterr()
    assert word in printed.err and printed.err.count("\n") == 1 and not printed.out


# ======================================================================================================================
# README
# ======================================================================================================================

README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "line", sorted(set(re.findall(r"python (?:soar|eval)\.py[^\n`|#]*", README)))
)
def test_commands_in_the_readme(line):
    """A flag that was renamed, or a value that is refused."""
    _, program, *argv = shlex.split(line.replace("$s", "0"))
    if "--benchmark" in argv:
        soar.parse_flags(argparse.ArgumentParser(), eval_.Benchmark, {}, argv)
    elif program == "soar.py":
        if "--help" not in argv:
            soar.parse_config(argv)
    else:
        eval_.parse_settings([word for word in argv if word != "--plot"])


def test_names_and_flags_in_the_readme():
    """A function, a method or a flag that the README speaks of and that is gone."""
    code = README.split("## Reading the code")[1].split("\n## ")[0]
    names = set(re.findall(r"`(\w+)`", code + README.split("## Assignments")[1].split("\n## ")[0]))
    known = {*dir(soar), *dir(eval_), *eval_.METHODS, *globals()}
    added = {name for tests in ASSIGNMENTS.values() for name in tests}  # by an assignment
    assert len(names) >= 20 and names <= known | added, names - known - added
    fields = dataclasses.fields(soar.Config) + dataclasses.fields(eval_.Settings)
    flags = {field.name for field in fields}
    flags |= {"help", "assignment", "grade", "json", "benchmark", "nproc_per_node"}
    for flag in re.findall(r"(?<![\w-])--([a-z][\w-]*)", README):
        assert flag.removeprefix("no-").replace("-", "_") in flags, flag


# ======================================================================================================================
# Everything together
# ======================================================================================================================


def test_promoted_student_beats_the_base(cache, tmp_path, capsys):
    """The point of it all: two outer steps lift the tiny world's model off a plateau where it never succeeds."""
    out = tmp_path / "run"
    sizes = (
        "--steps 2 --teacher-group 2 --teacher-batch 1 --kl 0.001 --pool 128 --window 1 --tau 0 --seed 2 --eval-samples 8 --n 32 --repeats 2 "
        "--inner-steps 20 --student-batch 16 --student-group 16 --student-lr 1e-3"
    ).split()  # whatever the preset is tuned to
    assert soar.main(["--out", str(out), "--cache", str(cache), *sizes]) == 0
    result = json.loads((out / "report.json").read_text())
    base, promoted = result["students"]["base model"], result["students"]["promoted student"]
    assert base["greedy"] == 0 and base["pass@1"] <= 0.01
    assert promoted["greedy"] >= 0.1 and promoted["pass@8"] >= 0.3
    for shares in [*result["topics"].values(), *(row["topics"] for row in log_rows(out))]:
        assert sum(shares.values()) == pytest.approx(1) and shares["other"] < 0.2
    assert "promoted student" in capsys.readouterr().out


TEACHER_PROMPT = r"""Four problems for practice, each with its answer.

<question>A box holds 3 rows of 4 eggs. How many eggs are in 5 boxes?</question><answer>\boxed{60}</answer>

<question>What is the remainder when 100 is divided by 7?</question><answer>\boxed{2}</answer>

<question>If $2x + 3 = 17$, what is the value of $x$?</question><answer>\boxed{7}</answer>

<question>What is the area of a right triangle with legs 6 and 9?</question><answer>\boxed{27}</answer>

<question>"""
STUDENT_PROMPT = r"""Problem: What is 15% of 80?
Answer: \boxed{12}

Problem: How many primes are less than 12?
Answer: \boxed{5}

Problem: {problem}
Answer:"""


def test_real_model(tmp_path):
    """The whole path on real problems with a real model: its tokenizer, its EOS that is also its pad, its size."""
    model = os.environ.get("SOAR_REAL_MODEL", "")
    if not model or not Path(model).is_dir():
        pytest.skip("SOAR_REAL_MODEL does not name the folder of a pretrained model")
    rows = [row for row in real_rows("math_test") if len(row["problem"]) < 100][:4]
    (tmp_path / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "teacher.txt").write_text(TEACHER_PROMPT)
    (tmp_path / "student.txt").write_text(STUDENT_PROMPT)
    out = tmp_path / "run"
    command = [
        sys.executable,
        str(ROOT / "soar.py"),
        "--model",
        str(Path(model).resolve()),
        *(
            "--dataset problems.jsonl --teacher-prompt teacher.txt --student-prompt student.txt --out run "
            "--cache cache --preset smoke --threads 1 --fail-k 1 --n 1 --student-batch 1 --student-group 4 --student-tokens 12 "
            "--teacher-tokens 80 --reward-questions 2 --eval-samples 1 --student-lr 1e-6"
        ).split(),
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr and "held-out hard problems" in done.stdout
    (row,) = log_rows(out)
    assert (
        all(math.isfinite(x) for rewards in row["rewards"] for x in rewards)
        and row["teacher"]["acceptance"] > 0
    )
    assert row["cost"]["tokens_per_second"]["sampled"] > 0
    left = {path.name for path in out.iterdir()}
    assert left >= {"config.json", "log.jsonl", "questions.jsonl", "report.json", "teacher"}
    tokenizer = transformers.AutoTokenizer.from_pretrained(out / "teacher")
    saved = transformers.AutoModelForCausalLM.from_pretrained(out / "teacher")
    assert tokenizer("1+1").input_ids and saved.num_parameters() > 10**6
