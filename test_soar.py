"""The tests of soar.py and eval.py: `python -m pytest`. Each test's one line names the bug that it guards against.

They need no network and no GPU, and write to pytest's temporary folder only. The tiny world's base model is trained
once for all tests. The last test needs a real pretrained model: it is skipped unless the environment variable
SOAR_REAL_MODEL names the folder of one. Those of the verifier over real answers need the folder of math_test.jsonl,
harp.jsonl and olympiadbench.jsonl in SOAR_REAL_DATA.
"""
import argparse
import copy
import dataclasses
import doctest
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
import time
from collections import Counter
from pathlib import Path

HUB = tempfile.TemporaryDirectory()  # an empty hub cache, and no network: the same on every machine
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": HUB.name}

import mpmath  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402

import eval as eval_  # noqa: E402
import soar  # noqa: E402
from soar import (RIGHT, Config, Problem, Rollout, UserError, answers_equal, extract_boxed, parses,  # noqa: E402
                  student_reward)

ROOT = Path(__file__).resolve().parent
torch.set_num_threads(1)  # for models this small a second thread only waits
transformers.logging.disable_progress_bar()


# ======================================================================================================================
# Helpers
# ======================================================================================================================


def random_model(kind: str = "Llama", vocab: int = 32, eos=(1,), seed: int = 0):
    """Two layers, width 32, weights large enough that the next token is far from uniform."""
    torch.manual_seed(seed)
    config = getattr(transformers, kind + "Config")(
        vocab_size=vocab, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.3, pad_token_id=0, bos_token_id=None,
        eos_token_id=list(eos))
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def bare_policy(model, reference=None):
    """A policy for tests that need no text."""
    return soar.Policy(model, reference, None, "", "{problem}", False, soar.snapshot(model), soar.Meter())


def small_config(**overrides) -> Config:
    """The tiny preset, with sizes for a test."""
    sizes = dict(dataset="tiny", n=4, datasets=2, repeats=2, inner_steps=2, batch=4, group=4, steps=4, k=8, window=1,
                 reward_questions=8, student_lr=3e-3, teacher_lr=1e-3)
    return Config(**soar.PRESETS["tiny"] | sizes | overrides)


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


def single_products(world) -> list[Problem]:
    """Worksheets of one misconceived product: the base model has them wrong, a few student steps get some right."""
    facts = sorted({pair for x, y in world for pair in ((x, y), (y, x))})
    return [Problem(soar.worksheet([f"{x}*{y}"]), soar.worksheet([x * y])) for x, y in facts]


def single_sums() -> list[Problem]:
    """Worksheets that the base model always has right."""
    return [Problem(soar.worksheet([f"{x}+{y}"]), soar.worksheet([x + y])) for x in range(4, 10) for y in range(4, 10)]


def trained(policy, dataset, steps, config, key) -> list[torch.Tensor]:
    """The weights of a student that starts from the live model."""
    batches = soar.epochs(dataset, steps, config.batch, soar.seeded(*key, "order"))
    soar.train_student(policy, batches, config, key)
    return soar.snapshot(policy.model)


def same(first, second) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def contents(folder: Path) -> dict:
    return {path: path.read_bytes() for path in sorted(Path(folder).rglob("*")) if path.is_file()}


def refused(capsys, argv, *words):
    """main() must say one sentence that contains `words` and end with code 2."""
    capsys.readouterr()
    assert soar.main(argv) == 2
    error = capsys.readouterr().err
    assert error.startswith("soar: ") and error.count("\n") == 1 and error.endswith("\n") and "Traceback" not in error
    assert all(word in error for word in words), error


# ======================================================================================================================
# 1. Config
# ======================================================================================================================


def test_flags_win_over_the_preset_and_the_preset_over_defaults():
    """A flag that equals the default must still beat the preset."""
    config = soar.parse_config(["--preset", "tiny", "--n", "64"])
    assert (config.n, config.inner_steps, config.repeats, config.tau) == (64, 20, 2, Config.tau)
    config = soar.parse_config(["--dataset", "x/problems.jsonl", "--seed", "3", "--no-promotion"])
    assert (config.preset, config.out, config.promotion) == ("gpu", "runs/problems-3", False)
    paper = dataclasses.asdict(soar.parse_config(["--dataset", "math", "--preset", "paper"]))
    changed = {name for name, value in paper.items() if value != getattr(Config, name)}
    assert changed == {"dataset", "preset", "out", "groups"}  # nothing else may differ from Table 3


def test_every_field_has_help(capsys):
    """A field whose comment does not fit the pattern would vanish from the flags; a bare % would break --help."""
    helped = [name for entries in soar.config_help(Config).values() for name in entries]
    assert sorted(helped) == sorted(field.name for field in dataclasses.fields(Config))
    with pytest.raises(SystemExit) as end:
        soar.parse_config(["--help"])
    assert end.value.code == 0 and "--reward-questions" in capsys.readouterr().out
    assert all(set(preset) <= set(helped) for preset in soar.PRESETS.values())


@pytest.mark.parametrize("argv, word", [
    (["--preset", "huge"], "--preset"), (["--steps", "0"], "--steps"), (["--datasets", "1"], "--datasets"),
    (["--group", "1"], "--group"), (["--temperature", "0"], "--temperature"), (["--student-lr", "nan"], "--student-lr"),
    (["--kl", "-1"], "--kl"), (["--reward", "vibes"], "--reward"),
    (["--dataset", "math", "--model", "tiny"], "tiny"), (["--model", "some/model"], "tiny"),
    (["--tau", "nan"], "--tau"), (["--kl", "nan"], "--kl"), (["--clip", "inf"], "--clip")])
def test_bad_values(argv, word):
    """Values that cannot work must be refused before hours of sampling. NaN passes every comparison with a bound."""
    with pytest.raises(UserError, match=word):
        soar.parse_config(argv)


def test_generators_depend_on_all_of_their_key():
    """Two students with the same random numbers would be one student."""
    keys = [(0, "student", 0, 0), (0, "student", 0, 1), (0, "student", 1, 0), (1, "student", 0, 0), (0, "propose", 0)]
    draws = [torch.rand(4, generator=soar.seeded(*key)).tolist() for key in keys]
    assert len({tuple(draw) for draw in draws}) == len(keys)
    assert draws[0] == torch.rand(4, generator=soar.seeded(*keys[0])).tolist()


# ======================================================================================================================
# 2. Verifier: a table of cases, hostile texts, and properties over real answers
# ======================================================================================================================

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

# times, units, money, percent, degrees, bases: free beside none, kept apart, scaled on one side only
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
    "__import__('os').system('touch pwned')", "exec('5')", "eval('5')", "x.__class__.__mro__",
    "lambda x: x", "5; import os", "open('pwned', 'w')", "().__class__.__bases__[0]", "print(5)",
    "5 if True else 6", "`touch pwned`", "%(5)s", "5#6", "5//1", "5&4", "5|1", "~-5", "5<<1",
    "int('5')", "__builtins__", "globals()", "f'{5}'", "'5'", "5 and __import__",
    r"\input{/etc/passwd}", r"\write18{ls}", r"\def\x{5}\x", r"\newcommand{\a}{5}\a",
    r"\csname 5\endcsname", r"\catcode`5", "sympy.Integer(5)", "Integer(5)", r"\sin.__class__",
    "<script>5</script>", "../../5", r"\url{5}"]
SIZES = [
    "9**9**9**9", "9^{9^{9^{9}}}", "9^9^9^9", "1000000000!", "((((3!)!)!)!)!", "3!!!!!!", "99999!!",
    "1e999999999", "1e9999", "10^{10^{10}}", "2^{100000}", r"\binom{1000000}{500000}",
    r"\binom{3000}{1500}!", "(10^{4000})!", "x!" + "!" * 300, "(10^{4000})^{(10^{4000})}",
    r"\exp(\exp(\exp(\exp(9))))", r"\pi^{\pi^{\pi^{\pi^{\pi}}}}", r"\sqrt{2^{16000}+1}",
    "(" + "9" * 380 + ")^{1/3}", "(" + "9" * 380 + ")^{9999}", "1/" * 199 + "1", "1/" * 400 + "1",
    "1." + "3" * 395, "5" * 399, "5" * 999, "5" * 100_000, "0." + "0" * 390 + "5",
    r"\sin(10^{9000})", r"\tan 90^\circ", r"\cos(10^{4000}i)", r"\log 0", "1/0", "0/0", "0^{-1}",
    r"\infty-\infty", r"\infty/\infty", r"0\cdot\infty", r"1^{\infty}", r"(-1)^{\infty}",
    "i^{i^{i^i}}", "(-1)!", "(1/2)!", "i!", r"\infty!", r"\lfloor i\rfloor",
    r"\lfloor\infty\rfloor", r"\sqrt[0]{5}", r"\sqrt[1000000000]{5}", r"\log_1 5", r"\log_{-1}5",
    r"\arcsin 10^{99}", r"\binom{-1}{-1}", r"\binom{1/2}{3}", r"\binom{5}{10^{9}}",
    r"\frac{1}{x-x}", r"\frac{x}{0}", "x^{x^{x^{x^x}}}", "x!!!!", "2^{2^{2^{2^x}}}",
    "x" + "^x" * 150, "x" + "^x" * 400, "x" + "^{x" * 25 + "}" * 25,
    r"\lfloor " * 30 + "x" + r"\rfloor " * 30, "*".join(["2^{9999}"] * 45),
    "*".join(["2^{9999}"] * 100), "+".join(["2^{9999}"] * 45), "*".join(["3000!"] * 60),
    "+".join(["1/3000!"] * 50), r"\sum_{i=1}^{10^9} i", r"\int_0^1 x dx", r"\lim_{x\to0}x"]
NESTS = [
    "(" * 20_000, "(" * 20_000 + "5" + ")" * 20_000, "(" * 199 + "5" + ")" * 200,
    "{" * 400 + "5" + "}" * 400, "[" * 150 + "5" + "]" * 150, "|" * 900, "|" * 399, "|x" * 150,
    "-" * 999 + "7", "-" * 399 + "7", "+" * 300, "!" * 399, "5" + "!" * 300, r"\frac" * 150,
    r"\frac" * 80, r"\sqrt" * 150 + "5", r"\sqrt" * 70 + "5", "√" * 399 + "5", "\\log " * 49 + "5",
    r"\sin" * 90 + "5", "^" * 300, "5" + "^" * 300, "_" * 300, "x" + "_x" * 150,
    "x" + "_{x" * 60 + "}" * 60, r"\boxed{" * 5000, r"\text{" * 60 + "5" + "}" * 60,
    r"\begin{pmatrix}" * 20 + "5", r"\\" * 200, "&" * 399, "\\!" * 400, "," * 399, "5," * 199,
    ",".join(r"\sqrt{%d}" % n for n in range(2, 40)), "=".join("x" * 100), "x=" * 150 + "5",
    "<".join("x" * 100), "5=5=5", "4=5", "0=0", "5<6", r"\pm" * 300, "±" * 399, "5" + "±5" * 150,
    ":" * 300, "5:" * 150 + "5", "5 " * 190, "5%" * 190, "°" * 399, r"\%" * 190, "$" * 399,
    "?" * 300, "." * 399, "5" + "." * 300, '"' * 900, "''" * 190, "5,5", "5,4,3"]
PATTERNS = [
    "a" * 399, "a" * 399 + "!", "a " * 199, "aaaa " * 79, "Aa" * 190, "A" + " a" * 190 + "=",
    "1," * 199, "1,000" * 70, "1,000," * 65, "1 000 " * 60, "0" * 398 + ":", "0:" * 190,
    "1:00 " * 70, r"\text{ " * 80, r"\text{" + "a " * 190, r"\hspace{" * 50, "{-}" * 130,
    "{,}" * 130, r"\overline{" * 39, "." * 200 + r"\overline{3}",
    "1" * 150 + "." + "1" * 150 + r"\overline{" + "1" * 80, r"\left|" * 60, "|a" * 190 + "|",
    r"\approx" * 50, r"\circ^" * 60, r"^{\circ" * 50, "and or " * 50, r"\{x|" * 90, r"\{ x " * 70,
    "f(" * 190, "f(" * 90 + ")" * 90, "P(a," * 90, "1e" * 190, "1e9" * 130, "x" * 150 + "y" * 150,
    "\\" * 399, r"\a" * 199, "apples " * 57, "1 1/" * 99]
STRANGE = [
    "٥", "⁵", "₅", "Ⅴ", "五", "½½½", "²", "∞∞", "∑", "√√√", "\u202e5", "5\u200b", "\u200b5",
    "5\u0301", "\ufeff5", "é", "ﬁ", "ﷺ" * 20, "ﷺ" * 399, "\u0130", "🙂" * 300, "\x00", "5\x00",
    "\x005", "\x1b[31m5", "\ud800", "5\udfff", "\udc00" * 99, "∎", "∎5", "5∎", "⟦5⟧", "′", "f′′",
    "α" * 200, "×5", "÷", "∅∅", "", " ", "\n", "~" * 399, " " * 399, "\u2028", "5\u20286", "5\x1c6",
    "5\x856", "5\u30006"]
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
    ("\\boxed{\n\\begin{pmatrix}1\\\\2\\end{pmatrix}\n}.", r"\begin{pmatrix}1\\2\end{pmatrix}")]

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
    ("", 0)]

PARSES = ["5", r"\frac{3}{4}", "x^2+1", "(1,2)", "a= 56 ,b= 54", "[0,1)", r"\$5", r"5\text{ cm}", "C",
          r"x \in [0,1]", r"\pm 3"]
PARSES_NOT = ["hello world", "", " ", r"\frac{", "4=5=6", "x+", "x^", "2 3", r"\text{hello}",
              "(1,2", r"\foo", "1,,x+", "()"]


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


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_texts_run_nothing_and_are_refused_quickly(kind):
    """A model can write anything: none of it may be executed, take a second, raise, or be right."""
    for text in HOSTILE[kind]:
        AUDITED.append("begin")
        start = time.process_time()
        for gold in ("5", "x+1", r"\sqrt2", "1,2", "(1,2)", "x>5", "55"):
            assert not answers_equal(text, gold) and not answers_equal(gold, text), (text[:60], gold)
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
    """The last complete box that is not blank; a scan for the last opening finds the unclosed one."""
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
    """The partial reward is for the last formulas and boxes only: a list of guesses must not pay."""
    assert student_reward(completion, "7") == reward


def test_parses():
    """What the teacher's answers must pass: mathematics throughout, and no words."""
    assert [text for text in PARSES if not parses(text)] == []
    assert [text for text in PARSES_NOT if parses(text)] == []


def test_the_steps_print_what_the_section_says():
    """The page is taught from: its example must be what the three steps do."""
    tokens = soar._tokens(soar._respell(r"\left( \dfrac12, 5\text{ cm} \right)"))
    assert " ".join(tokens) == r'( \frac { 1 } { 2 } , 5 "cm )'
    trees = soar._read(tokens)
    assert trees == [("()", (r"\frac", "1", "2"), ('"cm', "5"))]
    assert ("(0.5; 5.0)", set()) in soar._spellings(trees)


def test_a_student_can_add_a_rule(monkeypatch):
    """The exercise: 0.1(6) is read as a product until one line is added beside that of \\overline."""
    def verdicts():
        soar._readings.cache_clear()
        return [answers_equal("0.1(6)", other) for other in (r"\frac16", "0.1666666666666667", "0.6")]
    assert verdicts() == [False, False, True]
    rule = re.compile(r"(\d*)\.(\d*)\((\d+)\)"), soar._repeating  # 0.1(6) -> {0.10+6/90}
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
    deep = ["(" * 95 + "5" + ")" * 95, "-" * 190 + "5", "√" * 190 + "1", "x " * 190, "1/" * 95 + "1"]
    pairs = PAIRS[::3] + [(True, text, text + " + 0") for text in deep]
    first = verdicts()
    assert first[-len(deep):] == [True] * len(deep)
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
    folder = os.environ.get("SOAR_REAL_DATA")
    if not folder:
        pytest.skip("SOAR_REAL_DATA names no folder with the data sets")
    lines = Path(folder, f"{name}.jsonl").read_text("utf-8").split("\n")
    return [json.loads(line)["answer"] for line in lines if line]


def real_answers(count: int) -> list[str]:
    answers = real_golds("math_test") + real_golds("harp") + real_golds("olympiadbench")
    return random.Random(0).sample(sorted(set(answers)), count)


WORD = re.compile(r"(?<![a-zA-Z])(?!sin|cos|log)[a-zA-Z]{3,}|\b(by|to|no|is|th|Ps)\b")


@pytest.mark.parametrize("name", ["math_test", "harp", "olympiadbench"])
def test_real_golds_are_read(name):
    """An unread gold is matched by its own spelling only; of those without English words 0.5 % may be."""
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
        yield re.sub(r"(?<!\\)([(\[])", r"\\left\1", re.sub(r"(?<!\\)([)\]])", r"\\right\1", answer))
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
    if not words and not re.search(r"[()\[\]{}\\]|\d,\d{3}|[a-z], *[a-z]", answer) and "," in answer:
        items = answer.split(",")
        yield from (", ".join(items[::-1]), " and ".join(items), ";".join(items))
        yield r"\{" + answer + r"\}"
    if not re.search(r"[^-+\d^*/{}()a-z\\ ]|\\(?!frac|sqrt|pi)|\d\s*\\frac|\d \d|[a-z]{4} ", answer):
        yield from (f"({answer})", rf"1\cdot({answer})", f"2({answer})-({answer})")


def near_misses(answer: str):
    """Wrong answers that look like it."""
    words = r"\\(text|mbox|hspace)\{[^{}]*\}(\^\{?\d\}?)?"
    plain = re.sub(words, lambda found: "#" * len(found[0]), answer)
    for digit in list(re.finditer(r"\d", plain))[:3]:
        yield answer[:digit.start()] + str((int(digit[0]) + 1) % 10) + answer[digit.end():]
    if re.fullmatch(r"[\d./]*[1-9]|\\d?frac\{\d+\}\{\d+\}|\d*\\sqrt\{\d+\}|\d*\\pi", answer):
        yield from ("-" + answer, answer + "+1", answer + "i", f"2({answer})")
    if found := re.fullmatch(r"\(([^()\[\]]*,[^()\[\]]*)\)", answer):
        items = [item.strip() for item in found[1].split(",")]
        if items[0] != items[1]:
            yield "(" + ",".join([items[1], items[0], *items[2:]]) + ")"
        yield from (f"[{found[1]}]", f"[{found[1]})", f"({found[1]},0)")
        yield "(" + ",".join(items[:-1]) + ")"
    if re.fullmatch(r"-?\d+(, ?-?\d{1,2})+", answer):
        yield from (answer + ",7777", answer[answer.index(",") + 1:], f"({answer})")


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
    """A step grades hundreds. Typical: median 0.2 ms, 95 of 100 under 1 ms; the bounds are loose."""
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
    assert rewards.count(RIGHT) == 20 and len(calls) == 12  # 4 * 3 texts, and one is the gold answer


# ======================================================================================================================
# 3. Problems
# ======================================================================================================================


def test_read_jsonl(tmp_path):
    """Both field names, empty lines, numbers as answers, line separators in a text (only a newline ends a line)."""
    file = tmp_path / "p.jsonl"
    file.write_text('{"problem": " 1+1? ", "answer": "2"}\n\n{"question": "2+2\u2028?", "answer": 4}\n', "utf-8")
    assert soar.read_jsonl(str(file)) == [Problem("1+1?", "2"), Problem("2+2\u2028?", "4")]


@pytest.mark.parametrize("line", [
    b"{'problem': 'q'}", b"[1]", b"17", b'{"problem": "q"}', b'{"answer": "1"}', b'{"problem": "q", "answer": "  "}',
    b'{"problem": "", "answer": "1"}', b'{"problem": 5, "answer": "1"}', b'{"problem": "q", "answer": null}'])
def test_read_jsonl_names_the_bad_line(line, tmp_path):
    """A mistake in line 3 of 5000 must be found by its number, not turned into a problem."""
    file = tmp_path / "p.jsonl"
    file.write_bytes(b'{"problem": "q", "answer": "1"}\n\n' + line + b'\n{"problem": "q", "answer": "1"}\n')
    with pytest.raises(UserError, match="line 3"):
        soar.read_jsonl(str(file))


@pytest.mark.parametrize("content", [None, b'{"problem": "caf\xe9", "answer": "1"}\n', b"\n"],
                         ids=["missing", "latin-1", "empty"])
def test_read_jsonl_unreadable_file(content, tmp_path):
    """A file that is missing, not UTF-8 or without a problem must end in a sentence that names it."""
    file = tmp_path / "p.jsonl"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UserError, match="p.jsonl"):
        soar.read_jsonl(str(file))


# ======================================================================================================================
# Examples in docstrings
# ======================================================================================================================


@pytest.mark.parametrize("module", [soar, eval_])
def test_docstring_examples(module):
    """An example that is no longer true."""
    result = doctest.testmod(module)
    assert result.failed == 0 and result.attempted >= 3


# ======================================================================================================================
# 4. The tiny world
# ======================================================================================================================


def test_topic_of_what_the_world_writes():
    """The shares of the topics in the closing table would be wrong without an error."""
    world, rng = soar.make_world(0), random.Random(0)
    for topic, mark in (("products", "*"), ("sums", "+"), ("ambiguous", "x")):
        for length in range(1, 6):
            sheet = soar.worksheet([soar.random_item(rng, topic)[0] for _ in range(length)])
            assert soar.topic_of(sheet) == topic and mark in sheet
    assert {soar.topic_of(soar.textbook_exercise(world, rng)[0]) for _ in range(100)} == set(soar.TOPICS)
    mixed = [soar.worksheet(["4*5", "4+5"]), "a= 4*5 ,c", "b= 4*5", "", "What is 4*5?", "a= 4*5 <unk>"]
    assert [soar.topic_of(text) for text in mixed] == ["other"] * len(mixed)


def test_hard_worksheets():
    """A product that the crowd has right, or a wrong key, would end the plateau or make it unsolvable."""
    world = soar.make_world(0)
    sheets = soar.hard_worksheets(world, 200, 0)
    assert len({problem.question for problem in sheets}) == 200
    for problem in sheets:
        items, answers = problem.question.split(), problem.answer.split()
        assert items[::2] == answers[::2] == list(soar.LABELS)
        for item, answer in zip(items[1::2], answers[1::2]):
            x, y = map(int, item.split("*"))
            assert int(answer) == x * y != soar.product(world, x, y, right=False)


def test_world_is_a_function_of_its_seed():
    """Two runs that are compared must live in the same world; another seed must be another world."""
    assert soar.make_world(3) == soar.make_world(3) != soar.make_world(4)
    assert all(wrong != x * y for seed in range(5) for (x, y), wrong in soar.make_world(seed).items())
    worlds = [soar.hard_worksheets(soar.make_world(0), 20, seed) for seed in (0, 0, 1)]
    assert worlds[0] == worlds[1] != worlds[2]


def test_people_think_less_over_long_sheets():
    """Products that are right as often on long sheets as on short ones: luck, not SOAR, would end the plateau."""
    world, rng, right, asked = soar.make_world(0), random.Random(0), Counter(), Counter()
    for _ in range(20_000):
        question, answer = soar.forum_post(world, rng)
        items, answers = question.split()[1::2], answer.split()[1::2]
        for item, given in zip(items, answers):
            x, sign, y = item
            if sign == "*" and x != "x" and soar.product(world, int(x), int(y), right=False) != int(x) * int(y):
                asked[len(items)] += 1
                right[len(items)] += int(given) == int(x) * int(y)
    for length in range(1, 6):
        assert right[length] / asked[length] == pytest.approx(0.2 / length, rel=0.2)


def test_plateau_by_probability(policy):
    """The base model's own probabilities: a success among a run's 500,000 attempts at hard sheets must be unlikely, while short
    sheets are within reach."""
    def probability(sheets):
        rollouts = [Rollout(policy.student_prompt(p), policy.tokenizer(f"\\boxed{{ {p.answer} }} <eos>").input_ids, "", False)
                    for p in sheets]
        with torch.no_grad():
            return soar.completion_logprobs(policy.model, rollouts, 0.7).double().exp().mean().item()

    world = soar.make_world(0)
    assert probability(soar.hard_worksheets(world, 64, 0)) * 500_000 < 0.05
    assert 0.03 < probability(single_products(world)) < 0.5


# ======================================================================================================================
# 5. Policy
# ======================================================================================================================


def test_restore_is_in_place_and_snapshots_are_copies():
    """A snapshot that shares memory with the model changes with it; a restore that rebinds loses the optimizer."""
    model = random_model()
    weights, addresses = soar.snapshot(model), [p.data_ptr() for p in model.parameters()]
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1)
    assert not any(torch.equal(p, w) for p, w in zip(model.parameters(), weights))
    soar.restore(model, weights)
    assert same(model.parameters(), weights) and addresses == [p.data_ptr() for p in model.parameters()]


def test_braces_in_a_problem(policy):
    """str.format on a prompt stumbles over LaTeX."""
    seen = []
    policy.encode = seen.append
    policy.student_prompt(Problem(r"\frac{1}{2} {problem} {x}", "1"))
    assert seen == [r"User: \frac{1}{2} {problem} {x} Assistant:"]


# ======================================================================================================================
# 6. Sampler
# ======================================================================================================================

PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [12, 13], [14, 15, 16, 17]]


def model_that_ends(kind: str):
    """A random model, and two EOS ids by which its greedy completions of PROMPTS end at different times."""
    model = random_model(kind, eos=[1])
    model.generation_config.eos_token_id = [999]
    tokens, _ = soar.generate(model, PROMPTS, 1, 16)
    for pair in itertools.combinations(sorted(set(tokens.flatten().tolist())), 2):
        ends = [next((t for t, token in enumerate(row) if token in pair), 99) for row in tokens.tolist()]
        if len(set(ends)) == 3 and 1 < min(ends):
            model.generation_config.eos_token_id = list(pair)
            return model
    raise AssertionError("no such pair: take another seed for the random model")


@pytest.mark.parametrize("kind", ["Llama", "Qwen2", "GPT2"])  # GPT-2's positions are absolute: a shift shows
def test_greedy_equals_transformers(kind):
    """Wrong positions under left padding, a cache out of step after rows have left, a second EOS id that is ignored."""
    model = model_that_ends(kind)
    tokens, lengths = soar.generate(model, PROMPTS, 1, 16)
    T = max(map(len, PROMPTS))
    ids = torch.tensor([[0] * (T - len(p)) + p for p in PROMPTS])
    mask = torch.tensor([[0] * (T - len(p)) + [1] * len(p) for p in PROMPTS])
    expected = model.generate(input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=16, pad_token_id=0)
    expected = expected[:, T:]
    assert torch.equal(tokens[:, :expected.shape[1]], expected) and not tokens[:, expected.shape[1]:].any()
    eos = soar.eos_ids(model)
    assert len(eos) == 2 and len(set(lengths.tolist())) == 3
    for row, length in zip(tokens.tolist(), lengths.tolist()):
        assert length == 16 or row[length - 1] in eos
        assert not eos & set(row[:length - 1])


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
    """What generate() must equal: each row alone, a full forward for each token, no cache, no padding."""
    eos, rows = soar.eos_ids(model), []
    for row in range(len(prompts) * n):
        ids = list(prompts[row // n])
        for t in range(limit):
            with torch.no_grad():
                p = (model(input_ids=torch.tensor([ids])).logits[0, -1] / temperature).softmax(-1)
            ids.append(int((p.cumsum(0) <= uniforms[row, t]).sum()))  # the first whose cumulative probability exceeds u
            if ids[-1] in eos:
                break
        rows.append(ids[len(prompts[row // n]):])
    return rows


@pytest.mark.parametrize("kind", ["Llama", "Qwen2"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampling_equals_the_slow_way(kind, temperature):
    """Rows that leave the batch must take nothing of the others along, and a prompt's n completions stay together."""
    model = random_model(kind, eos=range(0, 32, 5))
    tokens, lengths = soar.generate(model, PROMPTS, 5, 12, temperature, uniforms(15, 12))
    expected = slow_sample(model, PROMPTS, 5, 12, temperature, uniforms(15, 12))
    assert [row[:length] for row, length in zip(tokens.tolist(), lengths.tolist())] == expected
    assert len(set(map(len, expected))) > 3  # rows did leave at different times
    assert all(not row[length:].any() for row, length in zip(tokens, lengths))


def test_sampling_frequencies():
    """Top-k, top-p or a temperature applied twice: samples from another policy than the one that is trained."""
    model, n = random_model(), 20_000
    tokens, _ = soar.generate(model, [PROMPTS[0]], n, 1, 0.7, uniforms(n, 1))
    expected = n * (model(input_ids=torch.tensor(PROMPTS[:1])).logits[0, -1] / 0.7).softmax(-1).detach()
    counts, common = torch.bincount(tokens[:, 0], minlength=32), expected > 5
    chi2 = ((counts - expected) ** 2 / expected)[common].sum().item()
    assert common.sum() > 10 and chi2 < 2 * common.sum() + 20  # its mean is the number of cells


def test_pick_tokens_at_the_ends():
    """u close to 1 with a rounded cumulative sum: an index after the vocabulary; u = 0: a token of probability 0."""
    logits = torch.full((2, 5), -math.inf)
    logits[:, 1:4] = 0.0
    assert soar.pick_tokens(logits, 1.0, torch.tensor([0.0, 1 - 2 ** -24])).tolist() == [1, 3]


def test_cache_is_allocated_once(monkeypatch):
    """A cache that is copied as it grows, or whenever a row leaves: most of the time of a long completion."""
    caches, real = [], soar.row_cache
    monkeypatch.setattr(soar, "row_cache", lambda *args: caches.append(real(*args)) or caches[-1])
    model, seen = random_model(eos=range(0, 32, 5)), set()
    model.register_forward_hook(lambda *_: seen.add((caches[0].layers[0].keys.data_ptr(), caches[0].layers[0].rows)))
    soar.generate(model, PROMPTS, 5, 12, 1.0, uniforms(15, 12))
    assert len({address for address, _ in seen}) == 1 and len({rows for _, rows in seen}) > 3
    assert caches[0].layers[0].keys.shape[2] == max(map(len, PROMPTS)) + 12


def test_generate_refuses_train_mode():
    """In train mode with checkpointing the cache is dropped in silence, and the tokens are wrong."""
    with pytest.raises(AssertionError, match="train mode"):
        soar.generate(random_model().train(), PROMPTS, 1, 2)


@pytest.mark.parametrize("rows", [1, 2, 5, 7, 1000])
def test_sample_in_parts(rows, policy):
    """--sample-rows below, at and above n must not lose, double or swap completions."""
    problems = single_products(soar.make_world(0))[:3]
    prompts = [policy.student_prompt(problem) for problem in problems]
    greedy = [r.text for r in soar.sample(policy, prompts, 1, 12, small_config())]
    assert len(set(greedy)) == 3
    rollouts = soar.sample(policy, prompts, 5, 12, small_config(sample_rows=rows))
    assert [r.prompt for r in rollouts] == [prompt for prompt in prompts for _ in range(5)]
    assert [r.text for r in rollouts] == [text for text in greedy for _ in range(5)]


def test_sample_rows_change_no_sample(policy):
    """Parts that start from the same random numbers would repeat each other; and memory must not decide what is sampled."""
    prompts = [policy.teacher_prompt(), policy.student_prompt(Problem("a= 4*5", ""))]
    texts = [[r.text for r in soar.sample(policy, prompts, 12, 40, small_config(sample_rows=rows), soar.seeded("parts"))]
             for rows in (1000, 12, 5)]
    assert texts[0] == texts[1] == texts[2] and len(set(texts[0][:12])) > 6


def test_rollouts_end_with_eos_or_are_truncated(policy):
    """EOS must stay in the trained ids and out of the text."""
    prompts = [policy.student_prompt(problem) for problem in single_products(soar.make_world(0))[:4]]
    (eos,) = soar.eos_ids(policy.model)
    for rollout in soar.sample(policy, prompts, 4, 24, small_config(), soar.seeded(0)):
        assert rollout.completion[-1] == eos and not rollout.truncated and "<eos>" not in rollout.text
        assert rollout.text.split() == policy.tokenizer.convert_ids_to_tokens(rollout.completion[:-1])
    for rollout in soar.sample(policy, prompts, 4, 2, small_config(), soar.seeded(0)):
        assert len(rollout.completion) == 2 and rollout.truncated


# ======================================================================================================================
# 7. The hard set
# ======================================================================================================================


@pytest.mark.parametrize("n, c", [(1, 0), (1, 1), (4, 0), (4, 1), (5, 2), (6, 4), (6, 6)])
def test_pass_at_k_against_all_subsets(n, c):
    """The estimator 1 - (1 - c/n)^k, which is biased, or a product that goes wrong where k > n - c."""
    for k in range(1, n + 1):
        subsets = list(itertools.combinations([1] * c + [0] * (n - c), k))
        assert soar.pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-12)


@pytest.mark.parametrize("k", [1, 8, 20, 128])
@pytest.mark.parametrize("repeats", [1, 7])
def test_filter_keeps_what_fails_k_times(k, repeats, policy, tmp_path, monkeypatch):
    """A problem lost between two limits or two parts, or one kept that was solved once."""
    first = dict(enumerate([0, 7, 8, 19, 20, 31, 32, 127, 128, 999] * repeats))  # problem -> its first sample that is right
    pool, drawn = [Problem(str(i), "1") for i in first], dict.fromkeys(first, 0)

    def solve(policy, problems, n, *_):
        rewards = []
        for i in (int(problem.question) for problem in problems):
            rewards += [RIGHT if drawn[i] + j == first[i] else 10.0 for j in range(n)]
            drawn[i] += n
        return [], torch.tensor(rewards, dtype=torch.float64)

    monkeypatch.setattr(soar, "solve", solve)
    hard = soar.hard_problems(policy, pool, small_config(k=k, cache=str(tmp_path)))
    assert [int(problem.question) for problem in hard] == [i for i in first if first[i] >= k]
    assert all(drawn[i] == k for i in first if first[i] >= k)
    assert drawn[0] == min(k, 8)  # easy problems are cheap


def test_filter_goes_on_after_a_stop(policy, tmp_path, monkeypatch):
    """A filter of hours that is interrupted must go on where it was, and come to the same set."""
    pool = [p for pair in zip(single_sums(), single_products(soar.make_world(0))) for p in pair][:56]
    pool += soar.hard_worksheets(soar.make_world(0), 14, 0)  # 70 problems: three parts of at most 32
    config = small_config(k=12, cache=str(tmp_path / "whole"))
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
    assert soar.hard_problems(policy, pool, config) == whole and len(calls) == needed  # a finished one is read
    config.cache = str(tmp_path / "parts")
    for stop in (4, 3):  # in the middle of the second part, and at the start of the third
        calls.clear()
        with pytest.raises(KeyboardInterrupt):
            soar.hard_problems(policy, pool, config)
        assert len(list((tmp_path / "parts").iterdir())) == 1
    calls.clear()
    stop = None
    assert soar.hard_problems(policy, pool, config) == whole and len(calls) == 2


def test_filter_cache_is_keyed_by_what_matters(policy, tmp_path):
    """The hard set of other weights, another k or another prompt must not be taken for this one's."""
    pool, config = single_products(soar.make_world(0))[:2], small_config(k=1, cache=str(tmp_path))
    cache = lambda: len(list(tmp_path.iterdir()))
    soar.hard_problems(policy, pool, config)
    assert cache() == 1
    for change in ({"k": 2}, {"temperature": 0.9}, {"student_tokens": 20}, {"data_seed": 1}):
        before = cache()
        soar.hard_problems(policy, pool, dataclasses.replace(config, **change))
        assert cache() == before + 1
    soar.hard_problems(policy, pool[:1], config)
    policy.student_text = "User: {problem}  Assistant:"
    soar.hard_problems(policy, pool, config)
    with torch.no_grad():
        next(reversed(list(policy.model.parameters())))[-1] += 1e-3  # one single weight
    soar.hard_problems(policy, pool, config)
    assert cache() == 8


def test_filter_cache_damaged(policy, tmp_path):
    """A damaged file must be named, not started over and not trusted."""
    pool, config = single_products(soar.make_world(0))[:2], small_config(k=1, cache=str(tmp_path))
    soar.hard_problems(policy, pool, config)
    (file,) = tmp_path.iterdir()
    file.write_text(file.read_text()[:-5])
    with pytest.raises(UserError, match=file.name):
        soar.hard_problems(policy, pool, config)


def test_split():
    """Train and test that overlap: the final table would be about problems that paid the teacher."""
    problems = [Problem(str(i), "1") for i in range(21)]
    train, test = soar.split_hard(problems, Config())
    assert len(train) == 10 and len(test) == 11 and {*train, *test} == {*problems}
    assert soar.split_hard(problems, Config(seed=5)) == (train, test)  # shared by runs with different seeds
    assert soar.split_hard(problems, Config(data_seed=1)) != (train, test)
    for few in ([], problems[:1]):
        with pytest.raises(UserError, match="--pool"):
            soar.split_hard(few, Config())


# ======================================================================================================================
# 8. Optimizer
# ======================================================================================================================


@pytest.mark.parametrize("weight_decay, clip", [(0.0, 0.0), (0.1, 0.0), (0.1, 0.5)])
def test_adamw_equals_torch(weight_decay, clip):
    """Bias correction, decoupled decay, eps outside of the root, clipping by the norm of all gradients together."""
    torch.manual_seed(0)
    ours, theirs = (torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Linear(5, 4)) for _ in range(2))
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
        assert all(p.grad is None for p in ours.parameters())  # or the next batch would be added to this one
        for a, b in zip(ours.parameters(), theirs.parameters()):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


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
    """Plain rounding loses steps of 1e-5 on weights near 0.02: the inner loop would train nothing."""
    start = (0.016 + 0.014 * torch.rand(4096, generator=torch.Generator().manual_seed(0))).to(torch.bfloat16)

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
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0] and rates[7] == pytest.approx(0.5) and rates[10:] == [0.0] * 5
    assert all(a > b for a, b in zip(rates[4:10], rates[5:11]))


# ======================================================================================================================
# 9. RLOO
# ======================================================================================================================


def flat_gradient(model) -> torch.Tensor:
    gradient = torch.cat([p.grad.flatten().double() for p in model.parameters()])
    for p in model.parameters():
        p.grad = None
    return gradient


@pytest.fixture
def update_gradient(monkeypatch):
    """policy_update() with the optimizer's step replaced by a look at the gradient."""
    seen = []
    monkeypatch.setattr(soar, "adamw_step", lambda model, *_: seen.append(flat_gradient(model)) or 0.0)

    def gradient(policy, rollouts, advantages, **overrides):
        config = small_config(**{"kl": 0.0, **overrides})
        soar.policy_update(policy, rollouts, torch.as_tensor(advantages, dtype=torch.float64), None, 1e-3, config)
        return seen.pop()
    return gradient


def slow_logprob(model, rollout: Rollout, temperature: float = 1.0):
    """What completion_logprobs() must equal: full logits of one sequence, in float64."""
    ids = rollout.prompt + rollout.completion
    logprobs = (model(input_ids=torch.tensor([ids])).logits[0].double() / temperature).log_softmax(-1)
    return sum(logprobs[t - 1, ids[t]] for t in range(len(rollout.prompt), len(ids)))


def some_rollouts(model, n: int = 4) -> list[Rollout]:
    tokens, lengths = soar.generate(model, PROMPTS, n, 10, 1.0, uniforms(n * len(PROMPTS), 10, 3))
    rows = [row[:length] for row, length in zip(tokens.tolist(), lengths.tolist())]
    return [Rollout(PROMPTS[i // n], row, "", False) for i, row in enumerate(rows)]


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
            group = rewards[start:start + G].tolist()
            expected += [group[i] - sum(group[:i] + group[i + 1:]) / (G - 1) for i in range(G)]
        torch.testing.assert_close(soar.rloo_advantages(rewards, G), torch.tensor(expected, dtype=torch.float64))


def test_equal_rewards_give_exactly_zero():
    """An advantage of 1e-15 instead of 0 would send flat groups through the forward pass."""
    for reward in (0.0, 10.0, 20.0, 120.0):
        for G in (2, 3, 7, 32):
            assert not soar.rloo_advantages(torch.full((2 * G,), reward, dtype=torch.float64), G).any()


def test_rloo_gradient_is_unbiased_by_enumeration():
    """The expected update over all groups must be the gradient of the expected reward, exactly."""
    logits = torch.tensor([0.3, -1.0, 0.8, 0.0], dtype=torch.float64, requires_grad=True)
    rewards, p, G = torch.tensor([120.0, 0.0, 10.0, 20.0], dtype=torch.float64), logits.softmax(0), 3
    (true,) = torch.autograd.grad((p * rewards).sum(), logits, retain_graph=True)
    scores = torch.stack([torch.autograd.grad(p[a].log(), logits, retain_graph=True)[0] for a in range(4)])  # [4, 4]
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


def test_eos_is_trained(update_gradient):
    """A mask made from `token != pad` drops EOS where pad is EOS: the model never learns to stop."""
    model = random_model(eos=[0, 1])  # 0 is the pad id, too
    ended, cut = Rollout(PROMPTS[0], [9, 8, 0], "", False), Rollout(PROMPTS[0], [9, 8], "", True)
    difference = (soar.completion_logprobs(model, [ended], 1.0) - soar.completion_logprobs(model, [cut], 1.0)).item()
    at_end = model(input_ids=torch.tensor([PROMPTS[0] + [9, 8]])).logits[0, -1].log_softmax(-1)[0].item()
    assert difference == pytest.approx(at_end, abs=1e-4)
    gradient, step = update_gradient(bare_policy(model), [ended], [1.0]), 0
    with torch.no_grad():
        for p in model.parameters():
            p -= 1e-4 * gradient[step:step + p.numel()].view_as(p)
            step += p.numel()
    assert model(input_ids=torch.tensor([PROMPTS[0] + [9, 8]])).logits[0, -1].log_softmax(-1)[0].item() > at_end


@pytest.mark.parametrize("kl", [0.0, 0.5])
def test_update_is_the_true_gradient_by_enumeration(kl, update_gradient):
    """The expected update over ALL completions must be the gradient of E[reward] - kl * KL(policy, reference). Guards
    against a KL estimator with another gradient (k1 as a loss: none; k3: the forward KL's), a sign, EOS left out."""
    model, reference = random_model(vocab=4, seed=0), random_model(vocab=4, seed=1)
    rollouts = all_rollouts([2, 3], vocab=4, eos=1, longest=3)
    assert len(rollouts) == 1 + 3 + 9 * 4
    rewards = torch.randn(len(rollouts), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    temperature = small_config().temperature
    logp = torch.stack([slow_logprob(model, rollout, temperature) for rollout in rollouts])
    ref = torch.stack([slow_logprob(reference, rollout, temperature).detach() for rollout in rollouts])
    divergence = (logp.exp() * (logp - ref)).sum()
    assert divergence > 0.3
    (-(logp.exp() * rewards).sum() + kl * divergence).backward()
    true = flat_gradient(model)
    policy = bare_policy(model, reference)
    expected = sum(p * update_gradient(policy, [rollout], [reward], kl=kl)
                   for p, rollout, reward in zip(logp.exp().tolist(), rollouts, rewards.tolist()))
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


@pytest.mark.parametrize("overrides", [{"micro_tokens": 1}, {"micro_tokens": 40}, {"checkpointing": True}])
def test_micro_batches_do_not_change_the_gradient(overrides, update_gradient):
    """A mean over micro-batches of different sizes weighs completions by their length."""
    policy = bare_policy(random_model(), random_model(seed=1))
    rollouts = some_rollouts(policy.model)
    advantages = soar.rloo_advantages(torch.arange(12.0) ** 2 % 7, 4)
    whole = update_gradient(policy, rollouts, advantages, kl=0.1, micro_tokens=10 ** 6)
    if overrides.get("checkpointing"):
        policy.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    parts = update_gradient(policy, rollouts, advantages, kl=0.1, **overrides)
    assert whole.norm() > 1 and (parts - whole).norm() < 1e-4 * whole.norm()
    assert not policy.model.training  # or the sampler would refuse


def test_micro_batches_hold_all_within_the_budget():
    """A rollout lost or used twice, or a budget that does not count padding."""
    rng = random.Random(0)
    rollouts = [Rollout([1] * rng.randint(1, 9), [1] * rng.randint(1, 9), "", False) for _ in range(50)]
    for budget in (1, 20, 60, 10 ** 6):
        batches = list(soar.micro_batches(rollouts, budget))
        assert sorted(i for batch in batches for i in batch) == list(range(50))
        for batch in batches:
            padded = len(batch) * max(len(rollouts[i].prompt) + len(rollouts[i].completion) for i in batch)
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


def test_update_without_signal_changes_nothing():
    """With all groups flat there is no gradient at all: moments and weights must stay, not decay."""
    policy = bare_policy(random_model(), random_model(seed=1))
    state = soar.adamw_state(policy.model)
    figures = soar.policy_update(policy, some_rollouts(policy.model), torch.zeros(12), state, 1.0, small_config())
    assert figures == {"grad_norm": 0.0, "kl": 0.0} and state["t"] == 0 and same(policy.model.parameters(), policy.base)


# ======================================================================================================================
# 11. Inner loop
# ======================================================================================================================


def test_student_depends_on_its_key_alone(policy):
    """Students in one stream of random numbers would depend on how many were trained before them."""
    dataset, config, students = single_products(soar.make_world(0))[:6], small_config(), []
    for key in ((0, "a"), (0, "b"), (0, "a")):
        soar.restore(policy.model, policy.base)
        students.append(trained(policy, dataset, 3, config, key))
    assert same(students[0], students[2]) and not same(students[0], students[1]) and not same(students[0], policy.base)


def test_epochs():
    """Drawing with replacement, one order for all epochs, or a last batch that is too small."""
    batches = soar.epochs(list(range(6)), 6, 4, soar.seeded("order"))  # 6 batches of 4 are 4 epochs of 6
    flat = sum(batches, [])
    assert list(map(len, batches)) == [4] * 6
    assert all(sorted(flat[i:i + 6]) == list(range(6)) for i in range(0, 24, 6)) and flat[:6] != flat[6:12]


def test_student_goes_on_where_it_stopped(policy):
    """A student resumed with fresh moments, or with the first batch again, is another student."""
    dataset, config, key = single_products(soar.make_world(0))[:6], small_config(), (0, "a")
    whole, kept = trained(policy, dataset, 4, config, key), []
    soar.restore(policy.model, policy.base)
    batches, moments = soar.epochs(dataset, 4, config.batch, soar.seeded(*key, "order")), soar.adamw_state(policy.model)
    soar.train_student(policy, batches, config, key, moments=moments, after_step=lambda step, _: kept.append(
        (soar.snapshot(policy.model), copy.deepcopy(moments)) if step == 1 else None))
    weights, moments = kept[1]
    soar.restore(policy.model, weights)
    soar.train_student(policy, batches, config, key, moments=moments, start=2)
    assert same(soar.snapshot(policy.model), whole) and not same(weights, whole)


# ======================================================================================================================
# 12. Teacher
# ======================================================================================================================


@pytest.mark.parametrize("text, expected", [
    (r"<question>2+3?</question><answer>\boxed{5}</answer>", ("2+3?", "5")),
    ("Sure!\n<question>\n2+3\nor so?\n</question>\nis\n<answer>\n$\\boxed{5}$.\n</answer> Bye.", ("2+3\nor so?", "5")),
    (r"<question>1</question><answer>\boxed{1}</answer> <question>2</question><answer>\boxed{2}</answer>", ("1", "1")),
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
    (r"<question>1?</question><answer>\boxed{}</answer>", None)])
def test_parse_problem(text, expected):
    """A problem without a question, or with a key that no student can meet, wastes a place in the dataset."""
    assert soar.parse_problem(text) == (expected and Problem(*expected))


def test_propose_resamples_until_full(policy):
    """Rejected completions must be replaced, be counted, and stay out of the update."""
    config = small_config(temperature=1.6)
    accepted, figures = soar.propose(policy, 30, config, soar.seeded("propose"))
    assert len(accepted) == 30 and 0.2 < figures["acceptance"] < 1
    assert all(soar.parse_problem(rollout.text) == problem for rollout, problem in accepted)
    again, _ = soar.propose(policy, 30, config, soar.seeded("propose"))
    assert [rollout.completion for rollout, _ in again] == [rollout.completion for rollout, _ in accepted]


def test_prompt_that_opens_the_question(policy):
    """A prompt that ends in <question> must not make every completion unreadable, nor the tag part of a question."""
    policy.teacher_text = "Teacher: <question>\n"
    accepted, figures = soar.propose(policy, 8, small_config(), soar.seeded("opens"))
    assert figures["acceptance"] > 0.5 and all("<" not in problem.question for _, problem in accepted)


def test_hopeless_teacher(policy):
    """A teacher that never keeps to the format must end in advice, not in an endless loop."""
    policy.teacher_text = "User: a= 4*5 Assistant:"
    with pytest.raises(UserError, match="0 of .*--teacher-prompt.*boxed"):
        soar.propose(policy, 4, small_config(), soar.seeded("hopeless"))


def test_proposition_1_by_enumeration():
    """With RLOO the update with ln pi_0 is that with ln pi = ln pi_0 - ln pi_0(S); with plain REINFORCE it is not."""
    logits = torch.tensor([0.3, -1.0, 0.8, 0.0, 0.5], dtype=torch.float64, requires_grad=True)
    accepted, rewards, G = [0, 2, 3], torch.tensor([0.2, 9.0, -0.1, 0.4, 9.0], dtype=torch.float64), 3
    pi_0 = logits.softmax(0)
    pi = pi_0 / pi_0[accepted].sum()
    grad = lambda p: torch.stack([torch.autograd.grad(p[a].log(), logits, retain_graph=True)[0] for a in range(5)])
    groups = torch.tensor(list(itertools.product(accepted, repeat=G)))  # [27, G]
    chances = pi.detach()[groups].prod(1)
    assert chances.sum().item() == pytest.approx(1)
    advantages = soar.rloo_advantages(rewards[groups].flatten(), G).view(-1, G)
    update = lambda weights, p: torch.einsum("b,bg,bgd->d", chances, weights, grad(p)[groups]) / G
    (true,) = torch.autograd.grad((pi * rewards)[accepted].sum(), logits, retain_graph=True)
    torch.testing.assert_close(update(advantages, pi_0), update(advantages, pi))
    torch.testing.assert_close(update(advantages, pi_0), true)
    torch.testing.assert_close(update(rewards[groups], pi), true)
    assert (update(rewards[groups], pi_0) - true).norm() > 0.1 * true.norm()


# ======================================================================================================================
# 13. Reward and promotion
# ======================================================================================================================


@pytest.mark.parametrize("rewards, index", [
    ([0.3], 0), ([0.3, 0.1], 0), ([0.1, 0.3], 1), ([0.3, 0.1, 0.2], 2), ([-0.2, 0.1, -0.5], 0),
    ([0.4, 0.1, 0.3, 0.2], 2), ([0.1, 0.2, 0.3, 0.4], 2)])
def test_median_student(rewards, index):
    """The best student of the best dataset is partly luck: the paper takes the median one."""
    assert soar.median_student(rewards) == index


@pytest.mark.parametrize("history, window, tau, due", [
    ([0.5], 3, 0.25, False), ([0.5, 0.5], 3, 0.25, False), ([0.5, 0.5, 0.5], 3, 0.25, True),
    ([0.25, 0.25, 0.25], 3, 0.25, False), ([0.5, 0.25, 0.25], 3, 0.25, True), ([9, 0, 0, 0], 3, 0.25, False),
    ([-9, 0.5, 0.5, 0.5], 3, 0.25, True), ([0.5], 1, 0.25, True), ([0.25], 1, 0.25, False), ([], 1, -1.0, False),
    ([-0.5, -0.25], 2, -1.0, True)])
def test_promotion_due(history, window, tau, due):
    """One lucky first step, a mean of exactly tau, or steps from before the window must not promote."""
    assert soar.promotion_due(history, Config(window=window, tau=tau)) is due
    assert soar.promotion_due(history, Config(window=window, tau=tau, promotion=False)) is False


def fresh_state(policy, **fields) -> soar.State:
    return soar.State(policy.base, soar.adamw_state(policy.model), policy.base, **fields)


@pytest.mark.parametrize("table, champion", [
    ([[0.1], [0.3]], (1, 0)), ([[0.5, 0.0], [0.3, 0.4]], (1, 1)), ([[0.3, 0.2, 0.4], [0.9, -0.3, 0.0]], (0, 0)),
    ([[0.0, 0.0], [0.0, 0.0]], (0, 1)), ([[-0.4, -0.2], [-0.1, -0.3]], (1, 0)),
    ([[0.1, 0.4, 0.2, 0.3], [0.2, 0.2, 0.2, 0.2]], (0, 3))])
def test_champion(table, champion, policy, monkeypatch):
    """The promoted student comes from the dataset with the best MEAN reward, wherever the best single student is."""
    before, trained, state = 0.5, [], fresh_state(policy)

    def train(policy, batches, config, key, after_step):
        trained.append(key[-2:])
        return [{"success": 0.0}]

    monkeypatch.setattr(soar, "train_student", train)
    monkeypatch.setattr(soar, "epochs", lambda *_: [])
    monkeypatch.setattr(soar, "snapshot", lambda _: ["weights of", *trained[-1]])
    monkeypatch.setattr(soar, "greedy_right", lambda *_: torch.tensor(
        [before + (table[trained[-1][0]][trained[-1][1]] if trained else 0)], dtype=torch.float64))
    rewards, errors, (k, j, weights), _ = soar.grounded_rewards(
        policy, [[]] * len(table), [], state, small_config(repeats=len(table[0])))
    assert ((k, j), weights) == (champion, ["weights of", *champion])
    torch.testing.assert_close(rewards, torch.tensor(table, dtype=torch.float64))
    assert errors.shape == rewards.shape


def test_grounded_rewards(policy, monkeypatch):
    """A student that starts from the one before it, rewards against the base and not the baseline, other questions."""
    world = soar.make_world(0)
    config, datasets = small_config(student_lr=1e-2, inner_extra=1, group=16), [single_products(world)[:4], single_products(world)[4:8]]
    soar.restore(policy.model, policy.base)
    baseline = trained(policy, single_products(world)[8:12], 3, config, ("another",))
    state, asked, steps_taken = fresh_state(policy, step=5, promotions=1), [], []
    state.baseline = baseline
    questions, right, train = single_products(world)[:10] + single_sums()[:6], soar.greedy_right, soar.train_student
    monkeypatch.setattr(soar, "greedy_right", lambda *args: asked.append(args[1]) or right(*args))
    monkeypatch.setattr(soar, "train_student", lambda *args: steps_taken.append(len(args[1])) or train(*args))
    rewards, errors, champion, figures = soar.grounded_rewards(policy, datasets, questions, state, config)
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
    others = [same(champion[2], weights) for weights in students.values()]  # one that met only flat groups stays the baseline
    assert same(champion[2], students[champion[:2]]) and sum(others) < 4


def test_learnability_rewards(policy, monkeypatch):
    """A problem that the student never solves is worth nothing; one that it solves at rate s is worth 1 - s."""
    times = {"never": 0, "once": 1, "half": 16, "always": 32}
    monkeypatch.setattr(soar, "solve", lambda policy, problems, n, *_: ([], torch.tensor(
        [RIGHT if i < times[problem.question] else 10.0 for problem in problems for i in range(n)]).double()))
    datasets = [[Problem("never", "1"), Problem("half", "1")], [Problem("once", "1"), Problem("always", "1")]]
    state, config = fresh_state(policy), small_config()
    rewards, errors, champion, figures = soar.learnability_rewards(policy, datasets, state, config)
    torch.testing.assert_close(rewards, torch.tensor([[0.25], [31 / 64]], dtype=torch.float64))
    assert champion is None and errors.shape == rewards.shape and figures["success"] == pytest.approx(49 / 128)


# ======================================================================================================================
# 15. Outer loop
# ======================================================================================================================


@pytest.mark.parametrize("tau", [10.0, -10.0])
def test_outer_step(tau, policy, tmp_path):
    """Without a promotion the baseline stays to the bit; with one it is the champion. Teacher and student never mix."""
    config = small_config(tau=tau, student_lr=1e-2, out=str(tmp_path), seed=7)
    hard_train, state = single_products(soar.make_world(0)) + single_sums(), fresh_state(policy)
    row = soar.outer_step(policy, hard_train, state, config)
    questions = state.questions
    assert len({sum(rewards) for rewards in row["rewards"]}) > 1, "no signal for the teacher: take another seed"
    assert not same(state.teacher, policy.base) and state.moments["t"] == 1 and state.step == 1
    assert same(policy.reference.parameters(), policy.base) and state.log == [row]
    assert [q["dataset"] for q in questions] == [0] * 4 + [1] * 4 and {q["step"] for q in questions} == {0}
    if tau > 0:
        assert same(state.baseline, policy.base) and state.history == [row["reward"]] and row["promotion"] is None
        assert not list(tmp_path.iterdir())
    else:
        k, j = row["promotion"]["dataset"], row["promotion"]["student"]
        soar.restore(policy.model, policy.base)
        dataset = [Problem(q["question"], q["answer"]) for q in questions if q["dataset"] == k]
        assert same(state.baseline, trained(policy, dataset, 2, config, (7, "student", 0, k, j)))
        assert state.history == [] and state.promotions == 1
        assert [Problem(**row) for row in state.promotion_questions] == dataset
        assert same(soar.load_model(str(tmp_path / "student"), config)[0].parameters(), state.baseline)


def test_teacher_moves_towards_the_better_dataset(policy, tmp_path, monkeypatch):
    """An advantage with the wrong sign, or one that lands on the problems of another dataset."""
    config, seen, propose = small_config(groups=2, kl=0.0, out=str(tmp_path), promotion=False), [], soar.propose
    monkeypatch.setattr(soar, "propose", lambda *args: seen.append(propose(*args)) or seen[0])
    rewards = torch.tensor([[0.5, 0.3], [0.0, 0.0], [-0.2, -0.2], [-0.1, -0.1]]).double()  # two groups of two datasets
    monkeypatch.setattr(soar, "grounded_rewards", lambda *_: (rewards, rewards * 0, (0, 0, policy.base), {}))
    state = fresh_state(policy)
    soar.outer_step(policy, single_sums(), state, config)
    rollouts = [rollout for rollout, _ in seen[0][0]]
    after, before = [], []
    for weights, result in ((policy.base, before), (state.teacher, after)):
        soar.restore(policy.model, weights)
        with torch.no_grad():
            result += soar.completion_logprobs(policy.model, rollouts, 1.0).view(4, 4).sum(1).tolist()
    change = [b - a for a, b in zip(before, after)]
    assert change[0] > change[1] and change[3] > change[2]


def test_best_promoted_student_is_kept(policy, tmp_path, monkeypatch):
    """A later promotion that is worse on the hard train set becomes the baseline, but not the reported student."""
    config, state = small_config(out=str(tmp_path)), fresh_state(policy, history=[0.5])
    accuracies, kept = iter([0.5, 0.25, 0.75]), []
    monkeypatch.setattr(soar, "greedy_right", lambda *_: torch.tensor([next(accuracies)]))
    for i in range(3):
        weights = [w + i for w in policy.base]
        soar.promote(policy, (0, 0, weights), [[Problem(str(i), "1")]], [], state, config)
        saved = soar.snapshot(soar.load_model(str(tmp_path / "student"), config)[0])
        kept.append(round((saved[0] - policy.base[0]).mean().item()))
        assert same(state.baseline, weights)
    assert kept == [0, 0, 2] and state.promotions == 3 and state.best_accuracy == 0.75
    assert [row["question"] for row in state.promotion_questions] == ["0", "1", "2"]


# ======================================================================================================================
# 14. and 16. The run folder and main
# ======================================================================================================================


@pytest.fixture(scope="session")
def toy(base, cache, tmp_path_factory):
    """Flags of a short run on a file of problems: 6 outer steps, rewards that are not zero, 3 promotions."""
    folder = tmp_path_factory.mktemp("toy")
    (folder / "student.txt").write_text("User: {problem} Assistant:")
    (folder / "teacher.txt").write_text("Teacher: <question>")
    problems = single_products(soar.make_world(0))
    (folder / "problems.jsonl").write_text("".join(json.dumps(vars(problem)) + "\n" for problem in problems))
    return [
        "--dataset", f"{folder}/problems.jsonl", "--student-prompt", f"{folder}/student.txt", "--model", base,
        "--teacher-prompt", f"{folder}/teacher.txt", "--cache", str(cache),
        *("--preset smoke --threads 1 --device cpu --steps 6 --n 4 --repeats 2 --inner-steps 3 --inner-extra 1 "
          "--seed 1 --batch 4 --group 8 --k 2 --pool 24 --reward-questions 8 --eval-samples 4 --tau -0.9 --window 2 "
          "--student-tokens 24 --teacher-tokens 40 --student-lr 1e-2 --teacher-lr 1e-3 --sample-rows 64 "
          "--micro-tokens 150").split()]


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
    files = ["questions.jsonl", "promotion_questions.jsonl", "report.json", "student/model.safetensors",
             "teacher/model.safetensors"]
    left = {name: (folder / name).read_bytes() for name in files}
    return left | {"log": [{name: value for name, value in row.items() if name != "cost"} for row in log_rows(folder)]}


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
    assert sum(row["teacher"]["grad_norm"] > 0 for row in rows) >= 2  # or resuming would not test the teacher's moments
    for row in rows:
        assert [len(x) for x in (*row["rewards"], *row["errors"])] == [2, 2, 2, 2]
        assert row["reward"] == pytest.approx(sum(map(sum, row["rewards"])) / 4)
        assert {"acceptance", "truncated", "length", "grad_norm", "kl"} <= set(row["teacher"])
        assert {"success", "flat_groups", "truncated", "length", "grad_norm", "kl"} <= set(row["student"])
        assert {"seconds", "tokens_per_second", "peak_memory_gb"} == set(row["cost"])
        for figures in (row["teacher"], row["student"], row["cost"]["tokens_per_second"]):
            assert all(math.isfinite(value) for value in figures.values())
    questions = [json.loads(line) for line in (finished / "questions.jsonl").read_text().splitlines()]
    assert len(questions) == 6 * 2 * 4
    for q in questions:
        assert q["reward"] == pytest.approx(sum(rows[q["step"]]["rewards"][q["dataset"]]) / 2)
    promoted = [(row["step"], row["promotion"]["dataset"]) for row in rows if row["promotion"]]
    expected = [{"question": q["question"], "answer": q["answer"]}
                for q in questions if (q["step"], q["dataset"]) in promoted]
    assert [json.loads(line) for line in (finished / "promotion_questions.jsonl").read_text().splitlines()] == expected
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
        process = subprocess.Popen(command + resume, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wait_for_lines(process, out / "log.jsonl", lines)
        time.sleep(seconds)
        process.kill()
        assert process.wait() == -signal.SIGKILL, "the run was over before it could be killed"
        assert 2 <= len((out / "log.jsonl").read_text().splitlines()) < 6
    assert soar.main([*toy, "--out", str(out), "--resume"]) == 0
    assert outcome(out) == outcome(finished)


@pytest.mark.parametrize("function, call", [
    ("save_checkpoint", 4), ("write_whole", 7), ("save_model", 2), ("policy_update", 40), ("report", 1)])
def test_resume_after_ctrl_c(function, call, toy, finished, tmp_path, monkeypatch, capsys):
    """A stop between any two writes of a step: a step logged but not saved, a promotion half done."""
    out, calls, real = tmp_path / "stopped", [], getattr(soar, function)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job of a shell starts with it ignored

    def stop(*args):
        calls.append(1)
        if len(calls) == call:
            signal.raise_signal(signal.SIGINT)
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(soar, function, stop)
        assert soar.main([*toy, "--out", str(out)]) == 130
    error = capsys.readouterr().err.strip()
    assert error.startswith("soar: ") and "\n" not in error and "--resume" in error and str(out) in error
    assert soar.main([*toy, "--out", str(out), "--resume"]) == 0
    assert outcome(out) == outcome(finished)


def torchrun(script: Path, *argv):
    """Two processes on this machine, with gloo. Without the -- torchrun would take --n for one of its own flags."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--", str(script), *argv]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=os.environ | {"PYTHONPATH": str(ROOT)})


def test_two_processes_come_to_the_same_as_one(toy, finished, tmp_path):
    """A student that depends on who trained others before it, results in another order, a file that both write."""
    done = torchrun(ROOT / "soar.py", *toy, "--out", str(tmp_path / "two"), "--cache", str(tmp_path / "cache"))
    assert done.returncode == 0, done.stderr
    one, two = outcome(finished), outcome(tmp_path / "two")
    assert len(one["log"]) == len(two["log"])
    for row, other in zip(one["log"], two["log"]):  # parts of the teacher's gradient are added in another order
        assert row.pop("teacher") == pytest.approx(other.pop("teacher"), rel=1e-5)
        assert row == other
    for name in one.keys() - {"log", "teacher/model.safetensors"}:
        assert one[name] == two[name]
    assert done.stdout.count("PROMOTION") == 3 and not list(tmp_path.rglob("*.tmp"))


def test_one_process_fails(toy, tmp_path):
    """The others must not wait for it for ever, and its message must be seen."""
    (tmp_path / "broken.py").write_text(
        "import os, sys\nimport soar\n"
        "def train_student(*_):\n    raise soar.UserError('the disk of process 1 is full')\n"
        "if os.environ['RANK'] == '1':\n    soar.train_student = train_student\nsys.exit(soar.main())\n")
    done = torchrun(tmp_path / "broken.py", *toy, "--out", str(tmp_path / "out"))
    assert done.returncode != 0 and "soar (process 1): the disk of process 1 is full" in done.stderr
    assert not (tmp_path / "out" / "log.jsonl").exists()


def test_resume_of_a_finished_run(toy, finished, tmp_path, capsys):
    """It must print its table again, and train nothing more."""
    out = copy_of(finished, tmp_path / "copy")
    capsys.readouterr()
    assert soar.main([*toy, "--out", str(out), "--resume"]) == 0
    printed = capsys.readouterr().out
    assert "promoted student" in printed and "held-out hard problems" in printed and "step   " not in printed
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
        assert "No student was promoted" in printed and "nobody is promoted in this run" in printed
        assert ("students train on each" in printed) == (i == 0) and ("does not train" in printed) == (i == 1)
        assert not (out / "student").exists() and json.loads((out / "report.json").read_text())["promotions"] == 0
        assert [row["promotion"] for row in log_rows(out)] == [None, None]


# --- Bad input


def test_run_folder_in_the_way(toy, finished, tmp_path, capsys):
    """Nothing that took hours may be written over, and no run may go on with other flags than it was started with."""
    run, foreign = copy_of(finished, tmp_path / "run"), tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("years of work")
    before = contents(tmp_path)
    refused(capsys, [*toy, "--out", str(run)], "--resume", "--out")
    refused(capsys, [*toy, "--out", str(run), "--resume", "--group", "4", "--seed", "2"], "--group 8", "--seed 1")
    for more in ([], ["--resume"]):
        refused(capsys, [*toy, "--out", str(foreign), *more], "foreign", "--out")
        refused(capsys, [*toy, "--out", str(foreign / "thesis.tex"), *more], "--out")
    assert contents(tmp_path) == before


@pytest.mark.parametrize("flag", ["--out", "--cache"])
def test_folder_that_cannot_be_made(flag, toy, tmp_path, capsys):
    """A folder under a file, a read-only disk: a sentence, and not after hours of filtering."""
    (tmp_path / "file").write_text("")
    refused(capsys, [*toy, "--out", str(tmp_path / "run"), flag, str(tmp_path / "file/sub")], str(tmp_path / "file"))


@pytest.mark.parametrize("name", ["checkpoint.pt", "config.json"])
@pytest.mark.parametrize("damage", [lambda data: data[:len(data) // 2], lambda data: b""], ids=["cut", "empty"])
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
    refused(capsys, [*toy, "--out", str(out), "--model", "nobody/no-such-model"], "nobody/no-such-model", "network")
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
    assert not out.exists()


@pytest.mark.parametrize("dataset", ["math", "harp", "olympiad"])
def test_no_network(dataset, toy, tmp_path, capsys):
    """The hub's libraries raise dozens of kinds of error, many lines long."""
    pytest.importorskip("datasets")
    refused(capsys, [*toy, "--out", str(tmp_path / "run"), "--dataset", dataset], dataset, "network")
    assert not (tmp_path / "run").exists()


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
    file.write_text('{"problem": "4*5", "answer": "20"}\n{"problem": "%s", "answer": "20"}\n' % ("4*5 " * 110))
    refused(capsys, [*argv, "--dataset", str(file)], "begins '4*5 4*5", "128")
    file.write_text('{"problem": "4*5", "answer": "20"}\nproblem,answer\n')
    refused(capsys, [*argv, "--dataset", str(file)], "file.txt", "line 2")
    refused(capsys, [*argv, "--dataset", str(tmp_path / "no.jsonl")], "no.jsonl")
    assert not out.exists()


def test_empty_hard_set(toy, tmp_path, monkeypatch, capsys):
    """A model that solves everything leaves nothing to split; a single problem neither."""
    out = tmp_path / "run"
    file = tmp_path / "one.jsonl"
    file.write_text('{"problem": "a= 4*5", "answer": "never"}\n')
    refused(capsys, [*toy, "--out", str(out), "--dataset", str(file)], "only 1", "--pool")
    monkeypatch.setattr(soar, "student_reward", lambda *_: RIGHT)
    refused(capsys, [*toy, "--out", str(out), "--cache", str(tmp_path / "cache")], "only 0", "--pool")
    assert not out.exists()


def no_memory(*_):
    raise MemoryError


def no_gpu_memory(*_):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def no_cpu_memory(*_):
    torch.empty(2 ** 55)  # PyTorch's own words for it on a CPU, which is a plain RuntimeError


@pytest.mark.parametrize("fail", [no_memory, no_gpu_memory, no_cpu_memory])
@pytest.mark.parametrize("function, flag", [("generate", "--sample-rows"), ("completion_logprobs", "--micro-tokens")])
def test_out_of_memory(function, flag, fail, toy, tmp_path, monkeypatch, capsys):
    """The message must name the flag that lowers the memory of what was going on."""
    monkeypatch.setattr(soar, function, fail)
    argv = [*toy, "--out", str(tmp_path / "run"), "--cache", str(tmp_path / "cache")]
    refused(capsys, argv, "memory", flag, "--resume")


def test_nan_in_mid_run(toy, finished, tmp_path, capsys, monkeypatch):
    """A learning rate that blows up the students must not reach the log or the checkpoint."""
    out = tmp_path / "run"
    rewards = itertools.count()  # all different, so that the first step already moves the student
    monkeypatch.setattr(soar, "student_reward", lambda *_: -next(rewards))
    refused(capsys, [*toy, "--out", str(out), "--student-lr", "1e39"], "NaN")
    assert not (out / "log.jsonl").exists() and not (out / "checkpoint.pt").exists()


# ======================================================================================================================
# eval.py
# ======================================================================================================================


@pytest.mark.parametrize("rewards, step", [
    ([], 0), ([10.0], 1), ([10.0] * 300, 0), ([float(s) for s in range(100)], 100),  # never flat: the last step
    ([0.0] * 100 + [float(s) for s in range(50)] + [50.0] * 100, 160),  # a slow start is not the end
    ([100.0 * (s >= 50) for s in range(120)], 62), ([float(s) for s in range(60)] + [30.0] * 60, 48)])
def test_chosen_step(rewards, step):
    """The paper's rule taken literally stops before a curve has started; an unsmoothed one stops at the first bump."""
    assert abs(eval_.chosen_step(rewards) - step) <= 2
    assert abs(eval_.chosen_step([3 * r - 7 for r in rewards]) - step) <= 2, "slopes are relative to the range"


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
    assert eval_.nested([[0.5, 0.7]])["sd_teachers"] is None and eval_.nested([[0.5, 0.7]])["sd"] > 0


def test_bootstrap():
    """The interval is about problems: more of them narrow it; it is that of the binomial where problems are coins."""
    few, many = np.arange(50) % 2.0, np.arange(5000) % 2.0
    low, high = eval_.bootstrap([few])
    assert low < 0.5 < high and high - low == pytest.approx(2 * 1.96 * 0.5 / 50 ** 0.5, rel=0.15)
    assert np.ptp(eval_.bootstrap([many])) < (high - low) / 5
    assert eval_.bootstrap([np.full(9, 0.25)]) == [0.25, 0.25]
    assert np.ptp(eval_.bootstrap([few, few])) < high - low, "two runs know more than one"


def test_vendi():
    """Identical items count once, orthogonal ones each, whatever their lengths; 2 + 1 of them by the formula."""
    assert eval_.vendi(np.ones((7, 3))) == pytest.approx(1)
    assert eval_.vendi(np.diag([1.0, 2, 3, 4])) == pytest.approx(4)
    two_and_one = np.array([[1.0, 0], [5.0, 0], [0, 2.0]])
    assert eval_.vendi(two_and_one) == pytest.approx(math.exp(-(2 / 3) * math.log(2 / 3) - (1 / 3) * math.log(1 / 3)))


@pytest.mark.parametrize("question, answer, verdict", [
    ("a= 7*8", "a= 56", (True, True)), ("a= 7*8", "a= 54", (True, False)), ("a= 7*8 ,b= 4+5", "a= 56 ,b= 9", (True, True)),
    ("a= 7*8 ,b= 4+5", "a= 56", (True, False)), ("a= x*8", "a= 56", (False, False)), ("b= 7*8", "b= 56", (False, False)),
    ("a= 7*8 ,b= x*4", "a= 56 ,b= 8", (False, False)), ("hello", "a= 56", (False, False)),
    ("a= 7*8 ,c= 4+5", "a= 56 ,c= 9", (False, False)), ("a= 7*8 a= 7*8", "a= 56", (False, False))])
def test_judge(question, answer, verdict):
    """A worksheet with an unknown, or with labels out of order, is no well-posed problem."""
    assert eval_.judge(Problem(question, answer)) == verdict


def test_majority_agrees():
    """Votes are counted by value, not by spelling; a solution without a box has none."""
    assert eval_.majority_agrees(["1/2", "3", "0.5", "3", r"\frac12", None, None, None, None], "0.50")
    assert not eval_.majority_agrees(["3", "3", "2"], "2") and not eval_.majority_agrees([None], "2")


def test_student_rollouts(policy, monkeypatch):
    """The budget that Hard-Only gets is all that SOAR's students sampled, counted where they sample."""
    config, state, sampled, solve = small_config(tau=10.0), fresh_state(policy), [], soar.solve
    monkeypatch.setattr(soar, "solve", lambda *args, **more: sampled.append(len(args[1]) * args[2]) or solve(*args, **more))
    hard_train = single_products(soar.make_world(0))
    run = eval_.Run(Path(), config, policy, hard_train, [], [soar.outer_step(policy, hard_train, state, config)],
                    "", [])
    assert eval_.student_rollouts(run) == sum(sampled)
    sampled.clear()
    run.config = dataclasses.replace(config, reward="learnability")
    run.log = [soar.outer_step(policy, hard_train, state, run.config)]
    assert eval_.kind_of(run.config) == "learnability"
    assert eval_.student_rollouts(run) == sum(sampled)


def test_inner_extra_counts():
    """Students are trained longer after a promotion."""
    config = Config(datasets=2, repeats=1, inner_steps=3, inner_extra=2, batch=4, group=5, reward_questions=8)
    log = [{"promotion": None}, {"promotion": {"dataset": 0}}, {"promotion": None}]
    run = eval_.Run(Path(), config, None, [None] * 6, [], log, "", [])  # 6 hard problems, not 8
    assert eval_.student_rollouts(run) == 2 * (2 * 3 * 20 + 3 * 6) + (2 * 5 * 20 + 3 * 6)


TOY_EVAL = "--steps 4 --points 2 --synthetic-steps 2 --questions 6 --samples 32 --threads 1".split()


@pytest.fixture(scope="session")
def tiny_runs(cache, tmp_path_factory):
    """A grounded run with a promotion, one without promotion, and one of the learnability teacher, in the tiny world."""
    folder, runs = tmp_path_factory.mktemp("tiny-runs"), {}
    for name, flags in (("grounded", []), ("no-promotion", ["--no-promotion"]), ("learnability", ["--reward", "learnability"])):
        runs[name] = folder / name
        assert soar.main([*"--steps 2 --n 4 --datasets 2 --repeats 1 --inner-steps 2 --batch 4 --group 4 --k 8 --pool 12 "
                          "--reward-questions 4 --eval-samples 1 --window 1 --tau -0.9".split(),
                          "--cache", str(cache), "--out", str(runs[name]), *flags]) == 0
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
        assert all(0 <= entry[f"pass@{k}"]["mean"] <= 1 and entry[f"pass@{k}"]["n"] == 2 for k in (1, 4, 8, 16, 32))
        assert entry["rollouts"] == (0 if name in ("base", "ps", "solver") else entry["rollouts"]) and f"| {name} " in screen
    rollouts = 2 * (2 * 2 * 16 + 3 * 4)  # students of two outer steps
    assert result["runs"][0]["rollouts"] == rollouts
    assert result["methods"]["hard-only-equal"]["rollouts"] == math.ceil(rollouts / 16) * 16
    assert result["methods"]["hard-only-4x"]["rollouts"] == 4 * 64
    assert result["methods"]["pq"]["rollouts"] == result["methods"]["hard-only"]["rollouts"] == 4 * 16
    about = result["questions"]["pq"]
    lines = (runs["grounded"] / "promotion_questions.jsonl").read_text().splitlines()
    assert about["questions"]["mean"] == len(lines) and 1 <= about["vendi"]["mean"] <= len(lines)
    judged = [eval_.judge(Problem(**json.loads(line))) for line in lines]
    assert about["well-posed"]["mean"] == pytest.approx(sum(w for w, _ in judged) / len(judged))
    assert (tmp_path / "out" / "eval.md").read_text().strip() in screen
    kept = sorted(path.name for name in runs for path in (runs[name] / "eval").iterdir())
    students = [name for name in kept if not name.startswith(("questions-", "about-"))]
    assert len(students) == 2 * len(eval_.METHODS) and not any(name.endswith((".pt", ".tmp")) for name in kept)
    curve = result["methods"]["pq"]["curves"][1]
    assert [point["step"] for point in curve] == [0, 2, 4] and curve[-1]["pass@32"] >= curve[-1]["pass@1"]
    for module, name in ((soar, "train_student"), (soar, "propose"), (soar, "right_counts"), (eval_, "embed")):
        monkeypatch.setattr(module, name, None)
    again = evaluated(runs.values(), tmp_path / "out", "--methods", "all", "--seeds", "2")
    assert again == result


def test_a_fresh_student_starts_from_the_base_model(tiny_runs, tmp_path, monkeypatch):
    """A student that starts where the one before it ended, or trains on the test half."""
    run, seen, train = copy_of(tiny_runs["grounded"], tmp_path / "run"), [], soar.train_student

    def spy(policy, batches, *rest, **more):
        seen.append((same(policy.model.parameters(), policy.base), [problem for batch in batches for problem in batch]))
        return train(policy, batches, *rest, **more)

    monkeypatch.setattr(soar, "train_student", spy)
    evaluated([run], tmp_path / "out", "--methods", "ps,pq,hard-only")
    opened = eval_.open_run(run, eval_.read_config(run, eval_.Settings()), eval_.Settings())
    assert [fresh for fresh, _ in seen] == [True, True] and not set(opened.train) & set(opened.test)
    assert set(seen[1][1]) <= set(opened.train)  # hard-only
    assert set(seen[0][1][:8]) <= set(opened.promotion_questions) and set(seen[0][1][8:]) <= set(opened.train)  # the curriculum
    mixed, _ = eval_.schedule(opened, "pq", opened.promotion_questions, eval_.Settings(mix="mixed", steps=9), ("key",))
    assert set(sum(mixed, [])) == set(opened.promotion_questions) | set(opened.train)


def test_an_interrupted_student_goes_on(tiny_runs, tmp_path, monkeypatch, capsys):
    """The same figures as without the interruption, and no step trained twice."""
    folders = [copy_of(tiny_runs["grounded"], tmp_path / name) for name in ("a", "b")]
    whole = evaluated(folders[:1], tmp_path / "a-out", "--methods", "pq")
    update, steps = soar.policy_update, []

    def interrupted(*args):
        steps.append(len(steps))
        if len(steps) == 4:
            raise KeyboardInterrupt
        return update(*args)

    monkeypatch.setattr(soar, "policy_update", interrupted)
    argv = [str(folders[1]), *TOY_EVAL, "--out", str(tmp_path / "b-out"), "--methods", "pq"]
    assert eval_.main(argv) == 130 and "eval.py" in capsys.readouterr().err
    assert [path.suffix for path in (folders[1] / "eval").iterdir()] == [".pt"]
    part = evaluated(folders[1:], tmp_path / "b-out", "--methods", "pq")
    assert part["methods"] == whole["methods"] and len(steps) == 4 + 2  # measured after 2 of 4 steps


def test_transfer_leaves_out_known_problems(finished, tmp_path, capsys):
    """Problems of the other set that SOAR has trained on must not count as transfer, however they are spaced."""
    run, other = copy_of(finished, tmp_path / "run"), tmp_path / "other.jsonl"
    known = eval_.open_run(run, eval_.read_config(run, eval_.Settings()), eval_.Settings()).train[:3]
    new = [Problem(soar.worksheet([f"{x}*9", f"{x}*8", f"{x}*7"]), "a= 1 ,b= 1 ,c= 1") for x in range(4, 10)]
    spaced = [Problem(problem.question.replace(" ", "  "), problem.answer) for problem in known]
    other.write_text("".join(json.dumps(vars(problem)) + "\n" for problem in spaced + new))
    evaluated([run], tmp_path / "out", "--methods", "base", "--dataset", str(other))
    assert "3 hard train and 3 hard test problems" in (screen := capsys.readouterr().out) and "; 3 problems" in screen


def test_real_problems_get_a_majority_vote(finished, tmp_path):
    """What is measured is agreement with a vote, so the word correct must not appear."""
    result = evaluated([copy_of(finished, tmp_path / "run")], tmp_path / "out", "--methods", "pq")
    assert set(result["questions"]["pq"]) == {"questions", "vendi", "agrees with the base model's majority vote"}
    assert 0 <= result["questions"]["pq"]["agrees with the base model's majority vote"]["mean"] <= 1


def test_bad_input_to_eval(tiny_runs, finished, tmp_path, capsys, monkeypatch):
    """One sentence each, that says what to do."""
    run = copy_of(tiny_runs["grounded"], tmp_path / "run")

    def refused_eval(argv, *words):
        capsys.readouterr()
        assert eval_.main([*map(str, argv)]) == 2
        error = capsys.readouterr().err
        assert error.startswith("eval: ") and error.count("\n") == 1 and all(word in error for word in words), error

    refused_eval([])
    refused_eval([tmp_path / "nothing"], "nothing", "no run folder")
    refused_eval([run, "--samples", "16"], "pass@32", "32 samples")
    refused_eval([run, "--methods", "ps,best"], "best", "pq")
    refused_eval([run, "--methods", "intrinsic-t"], "intrinsic-t", "learnability")
    refused_eval([run, "--mix", "shaken"], "--mix")
    refused_eval([run, "--seeds", "0"], "--seeds")
    refused_eval([run, "--dataset", "math"], "math", "tiny")
    refused_eval([run, finished], "data sets")
    refused_eval([copy_of(finished, tmp_path / "real"), *TOY_EVAL, "--methods", "upper"], "--curated")
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


def test_plot(tiny_runs, tmp_path):
    """All four panels from all kinds of run."""
    pytest.importorskip("matplotlib")
    folders = [copy_of(folder, tmp_path / name) for name, folder in tiny_runs.items()]
    evaluated(folders, tmp_path / "out", "--methods", "base,ps,pq", "--plot")
    assert (tmp_path / "out" / "eval.png").read_bytes().startswith(b"\x89PNG")


def test_benchmark(base, tmp_path, monkeypatch, capsys):
    """A part that breaks, a race in which the ways make different tokens' counts, a phase that is not counted."""
    monkeypatch.setattr(soar, "tiny_base_model", lambda config: base)
    monkeypatch.setattr(soar, "PRESETS", soar.PRESETS | {"tiny": soar.PRESETS["tiny"] | {
        "datasets": 2, "n": 2, "repeats": 1, "inner_steps": 2, "batch": 2, "group": 4}})
    flags = ["--benchmark", "--prompts", "2", "--samples", "4", "--repeats", "1"]
    assert eval_.main([*flags, "--out", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "benchmark.json").read_text())
    assert result["sampling"].keys() == {"soar.py", "generate, dynamic cache", "generate, static cache"}
    assert all(row["tokens/s"] > 0 for row in result["sampling"].values()) and result["update"]["full logits"]["tokens/s"] > 0
    shares = {phase: row["share"] for phase, row in result["step"].items()}
    phases = {"sampling", "log-probs", "backward", "optimizer", "grading", "weight swaps", "other"}
    assert shares.keys() == phases and sum(shares.values()) == pytest.approx(1) and min(shares.values()) > 0
    assert eval_.main([*flags, "--parts", "lunch"]) == 2 and "--parts lunch" in capsys.readouterr().err


def test_full_logits_are_the_same():
    """The slow update that the benchmark races against must compute the same thing."""
    model = random_model()
    rollouts = some_rollouts(model)
    torch.testing.assert_close(eval_.full_logprobs(model, rollouts, 0.7), soar.completion_logprobs(model, rollouts, 0.7))


def test_eval_settings_have_help():
    """A flag without a comment, or one that --help does not show."""
    helped = [name for entries in soar.config_help(eval_.Settings).values() for name in entries]
    assert helped == [field.name for field in dataclasses.fields(eval_.Settings)]


# ======================================================================================================================
# README
# ======================================================================================================================

README = (ROOT / "README.md").read_text()
EXERCISES = README.split("## Exercises")[1].split("\n## ")[0]


@pytest.mark.parametrize("line", sorted(set(re.findall(r"python (?:soar|eval)\.py[^\n`|#]*", README))))
def test_commands_in_the_readme(line):
    """A flag that was renamed, or a value that is refused."""
    _, program, *argv = shlex.split(line.replace("$s", "0"))
    if "--benchmark" in argv:
        argv = [re.sub(r"[|].*|\[|\]", "", word) for word in argv]
        soar.parse_flags(argparse.ArgumentParser(), eval_.Benchmark, argv)
    elif program == "soar.py":
        if "--help" not in argv:
            soar.parse_config(argv)
    else:
        eval_.parse_settings([word for word in argv if word != "--plot"])


@pytest.mark.parametrize("pattern", sorted(set(re.findall(r'pytest -k "?([\w ]+)"?', EXERCISES))))
def test_exercises_select_tests(pattern):
    """A test that an exercise speaks of and that is gone."""
    names = [name for name in globals() if name.startswith("test_")]
    for word in pattern.split(" or "):
        assert any(word in name for name in names), word


def test_exercises_start_at_what_is_there():
    """Functions, constants, flags and tests that the exercises name."""
    known = set(dir(soar)) | set(dir(eval_)) | set(dir(soar.Config)) | set(globals()) | set(eval_.METHODS)
    known |= {"new", "rewards", "products", "sums", "ambiguous", "assert_close", "success", "pi_0", "promotion"}  # plain words
    names = set(re.findall(r"`(\w+)`", EXERCISES))
    assert len(names) >= 15 and not names - known, names - known
    flags = {field.name for cls in (soar.Config, eval_.Settings) for field in dataclasses.fields(cls)}
    assert {name.removeprefix("no-").replace("-", "_") for name in re.findall(r"`--([\w-]+)", EXERCISES)} <= flags
    assert 8 <= len(re.findall(r"^\d+\. \*\*", EXERCISES, re.M)) <= 10


# ======================================================================================================================
# Everything together
# ======================================================================================================================


def test_promoted_student_beats_the_base(cache, tmp_path, capsys):
    """The point of it all: two outer steps lift the tiny world's model off a plateau where it never succeeds."""
    out = tmp_path / "run"
    sizes = ("--steps 2 --datasets 2 --pool 128 --window 1 --tau 0 --seed 2 --eval-samples 8 --n 32 --repeats 2 "
             "--inner-steps 20 --batch 16 --group 16 --student-lr 1e-3").split()  # whatever the preset is tuned to
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
    model, data = os.environ.get("SOAR_REAL_MODEL", ""), ROOT.parent / "shared/data/math_test.jsonl"
    if not model or not Path(model).is_dir():
        pytest.skip("SOAR_REAL_MODEL does not name the folder of a pretrained model")
    if not data.is_file():
        pytest.skip(f"{data} is missing")
    rows = map(json.loads, data.read_text(encoding="utf-8").splitlines())
    rows = [row for row in rows if len(row["problem"]) < 100][:4]
    (tmp_path / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "teacher.txt").write_text(TEACHER_PROMPT)
    (tmp_path / "student.txt").write_text(STUDENT_PROMPT)
    out = tmp_path / "run"
    command = [sys.executable, str(ROOT / "soar.py"), "--model", str(Path(model).resolve()),
               *("--dataset problems.jsonl --teacher-prompt teacher.txt --student-prompt student.txt --out run "
                 "--cache cache --preset smoke --threads 1 --k 1 --n 1 --batch 1 --group 4 --student-tokens 12 "
                 "--teacher-tokens 80 --reward-questions 2 --eval-samples 1 --student-lr 1e-6").split()]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr and "held-out hard problems" in done.stdout
    (row,) = log_rows(out)
    assert all(math.isfinite(x) for rewards in row["rewards"] for x in rewards) and row["teacher"]["acceptance"] > 0
    assert row["cost"]["tokens_per_second"]["sampled"] > 0
    left = {path.name for path in out.iterdir()}
    assert left >= {"config.json", "log.jsonl", "questions.jsonl", "report.json", "teacher"}
    tokenizer = transformers.AutoTokenizer.from_pretrained(out / "teacher")
    saved = transformers.AutoModelForCausalLM.from_pretrained(out / "teacher")
    assert tokenizer("1+1").input_ids and saved.num_parameters() > 10 ** 6
